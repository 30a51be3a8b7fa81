//! The command line: one file per command.
//!
//! Exit codes: 0 done; 1 a failure at work, a late rank among them; 2 a mistake in what was asked for, found before any
//! work; 74 the run's files cannot be written (EX_IOERR): the checkpoints that were complete still are; 75 saved and
//! ready to be started again (EX_TEMPFAIL); 101 a panic.

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

use std::{ffi::OsString, process::ExitCode};

use anyhow::Error;
use clap::{Parser, Subcommand};

use crate::{
    comm::{self, abort_world_on_panic, Communicator},
    memory,
    run::CannotWrite,
    signals,
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
    HumanEval(human_eval::Args),
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
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::AtWork(error.into())
    }
}

/// Marks errors of a part of a command as the user's.
trait OrMistake<T> {
    fn or_mistake(self) -> Result<T, Failure>;
}

impl<T, E: Into<Error>> OrMistake<T> for Result<T, E> {
    fn or_mistake(self) -> Result<T, Failure> {
        self.map_err(|e| Failure::Mistake(e.into()))
    }
}

/// Exit code of a run that saved and wants to be started again (EX_TEMPFAIL).
const START_AGAIN: u8 = 75;

/// Exit code where a run's files cannot be written.
const CANNOT_WRITE: i32 = 74;

/// Runs the program; `args` begin with its name.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    abort_world_on_panic();
    // before everything else: a signal that comes while a training run starts must not kill it
    let comm = match signals::install().and_then(|()| comm::start()) {
        Ok(comm) => comm,
        Err(e) => {
            eprintln!("error: {e:#}");
            return ExitCode::from(2);
        }
    };
    let comm = comm.as_ref();
    let first = comm.rank() == 0;
    init_logger(comm.rank());
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            if first {
                print_usage(&e);
            }
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2));
        }
    };
    match dispatch(cli, comm) {
        Ok(code) => code,
        Err(Failure::Mistake(e)) => {
            if first {
                eprintln!("error: {e:#}");
            }
            ExitCode::from(2)
        }
        Err(Failure::AtWork(e)) => {
            let text = format!("{e:#}");
            let text = memory::explain(&text).unwrap_or(text);
            let line = match comm.size() {
                1 => format!("error: {text}\n"),
                _ => format!("error: rank {}: {text}\n", comm.rank()),
            };
            // one write, so that the lines of several ranks stay whole; nobody is left to tell if it fails
            let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
            comm.abort(if e.downcast_ref::<CannotWrite>().is_some() { CANNOT_WRITE } else { 1 })
        }
    }
}

/// Help as clap lays it out, a mistake as one line like all others.
fn print_usage(error: &clap::Error) {
    use clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if !error.use_stderr() || error.kind() == DisplayHelpOnMissingArgumentOrSubcommand {
        // nobody is left to tell if the screen is gone
        let _ = error.print();
        return;
    }
    let text = error.to_string();
    let message = text.split("\n\n").next().unwrap_or_default();
    eprintln!("{} (see rldiff --help)", message.split_whitespace().collect::<Vec<_>>().join(" "));
}

fn dispatch(cli: Cli, comm: &dyn Communicator) -> Result<ExitCode, Failure> {
    let command = cli.command.unwrap_or(Command::Train(cli.train));
    if !matches!(command, Command::Train(_) | Command::Study(_)) {
        // the others have nothing to save: a signal ends them
        signals::release()?;
    }
    match command {
        Command::Train(args) => return train::run(args, comm),
        Command::Study(args) => return study::run(args, comm),
        Command::Check(args) => check::run(args, comm),
        Command::Inspect(args) => inspect::run(args, comm),
        Command::Sample(args) => sample::run(args, comm),
        Command::Eval(args) => eval::run(args, comm),
        Command::HumanEval(args) => human_eval::run(args, comm),
        Command::Report(args) => report::run(args, comm),
        Command::Score(args) => score::run(args, comm),
        Command::Export(args) => export::run(args, comm),
        Command::Encode(args) => encode::run(args, comm),
        Command::Pretrain(args) => pretrain::run(args, comm),
        Command::Doctor(args) => doctor::run(args, comm),
        Command::Tokenize(args) => tokenize::run(args, comm),
        Command::Bench(args) => bench::run(args, comm),
    }?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
