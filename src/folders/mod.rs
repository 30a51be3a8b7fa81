//! Whose a folder is, and what may be done to it: one rule for all commands that write.
//!
//! - A command that writes a folder over time holds it ([`FolderLock`]): a second one is refused and told who is there.
//! - Nothing is moved, replaced or deleted that rldiff did not write. What is there is known by what it holds
//!   ([`contents`], [`outputs`]), not by its name: a run's folder is set aside, an earlier output is replaced as a whole, an
//!   empty folder is used, and anything else ends the command before any work with a line that says what is in the way.
//! - A folder that is written at once appears whole or not at all ([`NewFolder`]).

pub mod contents;
mod lock;
mod lock_file;
mod new_folder;
pub mod outputs;
mod owner;
mod places;

pub use contents::{can_take, check_name, Place};
pub use lock::{release_all, FolderLock};
pub use new_folder::{can_be_new, replace_folder, NewFolder};
pub use owner::Owner;
pub use places::{can_be_file, can_be_folder};
