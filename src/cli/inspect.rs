//! `rldiff inspect`.

use std::path::PathBuf;

use super::{Failure, OrMistake};
use crate::{comm::Communicator, store};

#[derive(clap::Args)]
pub struct Args {
    /// A run's folder or its checkpoints (the newest sound one is shown), one checkpoint, or an HDF5 file.
    path: PathBuf,
    /// Print only the SHA-256 over the whole training state.
    #[arg(long)]
    digest: bool,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    if comm.rank() != 0 {
        return Ok(());
    }
    let text = if args.digest { store::digest(&args.path) } else { store::inspect(&args.path) };
    say!("{}", text.or_mistake()?.trim_end());
    Ok(())
}
