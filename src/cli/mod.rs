//! The command line: one file per command.
//!
//! Exit codes: 0 done; 1 a failure at work, a late rank among them; 2 a mistake in what was asked for, found before any
//! work; 74 a file or standard output cannot be written (EX_IOERR), for a reason that the operating system gives: the
//! checkpoints that were complete still are; 75 stopped by a signal and ready to be started again (EX_TEMPFAIL); 101 a
//! panic.
//!
//! Standard output that a reader closes (`| head`) ends nothing and is no failure: a command does what it was asked to do
//! and ends with the code it has without the reader. A training, or a study, goes on whatever becomes of standard output
//! and standard error.

mod bench;
mod check;
mod check_report;
mod config_args;
mod device_args;
mod doctor;
mod drawing_args;
mod encode;
mod eval;
mod export;
mod family;
mod human_eval;
mod inspect;
mod numbers;
mod pretrain;
mod report;
mod sample;
mod score;
mod study;
mod tokenize;
mod train;

use std::{ffi::OsString, io::ErrorKind, process::ExitCode, time::Duration};

use anyhow::{Context, Error};
use clap::{Parser, Subcommand};

use crate::{
    cannot_write::{CannotWrite, OfRanks},
    comm::{self, abort_world_on_panic, Communicator},
    device::numerics,
    memory, signals, start_up,
    streams::{self, complain},
    telemetry::init_logger,
};

/// Reinforcement-learning fine-tuning of text-to-image diffusion models, on one core or under MPI.
///
/// Without a command and without a CONFIG it runs the embedded miniature's joint experiment. Start it under MPI with
/// `mpirun -n RANKS rldiff …`: the number of ranks must divide run.lanes.
#[derive(Parser)]
#[command(name = "rldiff", version = crate::CODE_VERSION, args_conflicts_with_subcommands = true, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: train::Args,
}

#[derive(Subcommand)]
enum Command {
    /// Fine-tune a model (the default command).
    Train(train::Args),
    /// Validate a config, print what follows from it, build everything once, and quit.
    Check(check::Args),
    /// Print what a checkpoint, a run or an HDF5 shard holds.
    Inspect(inspect::Args),
    /// Make pictures from prompts.
    Sample(sample::Args),
    /// Score models on prompt sets, with the same noise for all of them.
    Eval(eval::Args),
    /// Build pages on which people compare models, and count their answers.
    HumanEval(Box<human_eval::Args>),
    /// Write one page on a run, or on several side by side.
    Report(report::Args),
    /// Train several methods with several seeds, compare their models, write the paper's tables.
    Study(study::Args),
    /// Judge image files by a reward.
    Score(score::Args),
    /// Write a checkpoint's model as a diffusers folder, or its adapters as a LoRA file.
    Export(export::Args),
    /// Put a config's pretraining pairs through VAE and text encoder, once for all iterations.
    Encode(encode::Args),
    /// Train the miniature from scratch (it made the embedded weights).
    Pretrain(pretrain::Args),
    /// Print versions and paths of everything in use and try each with a small real operation.
    Doctor(doctor::Args),
    /// Print the token ids of prompts read from standard input, one JSON array per line.
    Tokenize(tokenize::Args),
    /// Measure speed.
    Bench(bench::Args),
}

/// Why a command ended without success.
pub enum Failure {
    /// What was asked for cannot be done; the same on all ranks, found before any work.
    Mistake(Error),
    /// Something failed on this rank.
    AtWork(Error),
    /// A signal asked all ranks to stop, and what is done is on disk.
    Interrupted,
}

impl Failure {
    /// An interruption, or what `otherwise` makes of the error.
    fn of(error: Error, otherwise: fn(Error) -> Failure) -> Self {
        match signals::is_interruption(&error) {
            true => Failure::Interrupted,
            false => otherwise(error),
        }
    }
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::of(error.into(), Failure::AtWork)
    }
}

/// Marks errors of a part of a command as the user's.
trait OrMistake<T> {
    fn or_mistake(self) -> Result<T, Failure>;
}

impl<T, E: Into<Error>> OrMistake<T> for Result<T, E> {
    fn or_mistake(self) -> Result<T, Failure> {
        self.map_err(|e| Failure::of(e.into(), Failure::Mistake))
    }
}

/// Exit code of what a signal has stopped and wants to be started again (EX_TEMPFAIL).
const START_AGAIN: u8 = 75;

/// Exit code where files cannot be written.
const CANNOT_WRITE: u8 = 74;

/// What rank 0 has to report that a file cannot be written.
const AFTER_RANK_0: Duration = Duration::from_secs(2);

/// What NCCL has to leave after a mistake, which nothing in it waits for.
const AFTER_A_MISTAKE: Duration = Duration::from_secs(5);

/// Runs the program; `args` begin with its name.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    start_up::begin();
    abort_world_on_panic();
    streams::outlive_size_limits();
    // before everything else: a signal that comes while a training run starts must not kill it
    let comm = match signals::install().and_then(|()| start_up::phase("MPI", comm::start)) {
        Ok(comm) => comm,
        Err(e) => {
            complain(&format!("error: {e:#}\n"));
            return ExitCode::from(2);
        }
    };
    let comm = comm.as_ref();
    let first = comm.rank() == 0;
    init_logger(comm.rank());
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            let printed = if first { print_usage(&e) } else { Ok(()) };
            let code = u8::try_from(e.exit_code()).unwrap_or(2);
            return ExitCode::from(if printed.is_ok() { code } else { CANNOT_WRITE });
        }
    };
    let command = cli.command.unwrap_or(Command::Train(cli.train));
    let again = match &command {
        Command::Train(_) => "go on with --resume auto",
        _ => "the same command goes on where this one has stopped",
    };
    match dispatch(command, comm) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Interrupted) => {
            if first {
                log::info!("{again}");
            }
            ExitCode::from(START_AGAIN)
        }
        Err(Failure::Mistake(e)) => {
            if first {
                complain(&format!("error: {e:#}\n"));
            }
            comm::nccl::settle(AFTER_A_MISTAKE);
            ExitCode::from(if CannotWrite::caused(&e) { CANNOT_WRITE } else { 2 })
        }
        Err(Failure::AtWork(e)) => {
            let text = format!("{e:#}");
            let text = memory::explain(&text).or_else(|| numerics::explain(&text)).unwrap_or(text);
            let of_writing = CannotWrite::caused(&e);
            let once = of_writing && e.downcast_ref::<OfRanks>().is_some();
            if once && !first {
                // rank 0 says it for all of them, and ends them
                std::thread::sleep(AFTER_RANK_0);
            } else if once || comm.size() == 1 {
                complain(&format!("error: {text}\n"));
            } else {
                complain(&format!("error: rank {}: {text}\n", comm.rank()));
            }
            comm.abort(if of_writing { CANNOT_WRITE.into() } else { 1 })
        }
    }
}

/// Help as clap lays it out, a mistake as one line like all others.
///
/// # Errors
/// Help that standard output does not take; it is said on standard error.
fn print_usage(error: &clap::Error) -> Result<(), ()> {
    use clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if !error.use_stderr() {
        return match error.print() {
            Err(e) if e.kind() != ErrorKind::BrokenPipe => {
                complain(&format!("error: {}: {e}\n", CannotWrite::new("standard output")));
                Err(())
            }
            _ => Ok(()),
        };
    }
    if error.kind() == DisplayHelpOnMissingArgumentOrSubcommand {
        // nobody is left to tell if the screen is gone
        let _ = error.print();
        return Ok(());
    }
    let text = error.to_string();
    let message = text.split("\n\n").next().unwrap_or_default();
    complain(&format!("{} (see rldiff --help)\n", message.split_whitespace().collect::<Vec<_>>().join(" ")));
    Ok(())
}

/// What libraries need and end the process without.
fn surroundings() -> Result<(), Error> {
    // libtorch asks it for the processor
    std::fs::metadata("/proc/cpuinfo").context("/proc is not mounted here; libtorch needs /proc/cpuinfo")?;
    Ok(())
}

fn dispatch(command: Command, comm: &dyn Communicator) -> Result<(), Failure> {
    comm::all_made(comm, surroundings()).or_mistake()?;
    if !matches!(command, Command::Train(_) | Command::Study(_) | Command::Eval(_) | Command::Encode(_)) {
        // the others have nothing to save: a signal ends them
        signals::release()?;
    }
    let outlives = matches!(command, Command::Train(_) | Command::Study(_));
    match command {
        Command::Train(args) => train::run(args, comm),
        Command::Study(args) => study::run(args, comm),
        Command::Check(args) => check::run(args, comm),
        Command::Inspect(args) => inspect::run(args, comm),
        Command::Sample(args) => sample::run(args, comm),
        Command::Eval(args) => eval::run(args, comm),
        Command::HumanEval(args) => human_eval::run(*args, comm),
        Command::Report(args) => report::run(args, comm),
        Command::Score(args) => score::run(args, comm),
        Command::Export(args) => export::run(args, comm),
        Command::Encode(args) => encode::run(args, comm),
        Command::Pretrain(args) => pretrain::run(args, comm),
        Command::Doctor(args) => doctor::run(args, comm),
        Command::Tokenize(args) => tokenize::run(args, comm),
        Command::Bench(args) => bench::run(args, comm),
    }?;
    // a training and a study outlive their standard output
    if !outlives {
        streams::outcome()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
