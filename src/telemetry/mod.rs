//! What a run says and leaves behind: log lines, metrics, TensorBoard events, curves, picture sheets, the summary.
//!
//! Only rank 0 owns these. Nothing here knows a tensor, a communicator or a config: the stages hand over numbers
//! ([`Metrics`], [`Summary`]) and plain pictures ([`Picture`]), and [`RunFiles`] says where each file of a run lies.
//!
//! ```text
//! iteration ──► Metrics ──┬─► JsonlWriter   metrics.jsonl, every digit
//!                         ├─► EventWriter   tensorboard/events.out.tfevents.*
//!                         └─► Progress      bar on a terminal, aligned lines elsewhere
//! evaluations ─► SampleSheet   samples/<task>/iteration-NNNNNN.png
//! end of run ─► reward_curves.png · before_after.png · summary.json + the table on the screen
//! ```

mod atomic_file;
mod axis;
mod curves;
mod ending;
mod grid;
mod metrics;
pub(crate) mod number;
mod picture;
mod progress;
mod run_files;
mod samples;
mod screen;
mod summary;
mod tensorboard;
mod text;

pub use atomic_file::{write_atomic, write_atomic_with};
pub(crate) use axis::Axis;
pub use curves::{draw_reward_curves, plot_series, RewardPanel, Series};
pub(crate) use curves::{mean_window, running_mean};
pub use ending::{Ending, FallBack, Reason};
pub use grid::{before_after_sheet, image_grid, mosaic, BeforeAfter, Column, GridRow};
pub use metrics::{names, read_metrics, JsonlWriter, Metrics};
pub(crate) use picture::{encode_png, picture_size};
pub use picture::{png_text, read_png, save_png, Picture};
pub use progress::Progress;
pub use run_files::RunFiles;
pub use samples::SampleSheet;
pub(crate) use screen::suspended;
pub use screen::{init_logger, Screen};
pub use summary::{Estimate, Summary, TaskSummary};
pub use tensorboard::EventWriter;
