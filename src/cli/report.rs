//! `rldiff report`: a page on one run or several.

use std::path::PathBuf;

use super::{Failure, OrMistake};
use crate::{
    comm::Communicator,
    folders::{can_be_file, outputs},
    report,
    telemetry::write_atomic,
};

#[derive(clap::Args)]
pub struct Args {
    /// Folder of a run; several are set side by side.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The page [default: report.html in the run's folder, or here for several runs].
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    if comm.rank() != 0 {
        return Ok(());
    }
    let out = args.out.clone().unwrap_or_else(|| match args.runs.as_slice() {
        [run] => run.join("report.html"),
        _ => PathBuf::from("report.html"),
    });
    let page = report::page(&args.runs).or_mistake()?;
    can_be_file(&out).or_mistake()?;
    outputs::may_replace(&out, report::is_page).or_mistake()?;
    write_atomic(&out, page.as_bytes())?;
    say!("{}", out.display());
    Ok(())
}
