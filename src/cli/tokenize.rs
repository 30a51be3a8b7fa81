//! `rldiff tokenize`: what a model's tokenizer makes of prompts.

use std::io::{self, BufRead, BufWriter, ErrorKind, Write};

use anyhow::{anyhow, Context};

use super::{Failure, OrMistake};
use crate::{
    comm::Communicator,
    models::{folder::ModelFiles, tokenizer::Tokenizer},
    run::model_location,
};

#[derive(clap::Args)]
pub struct Args {
    /// `embedded`, or a folder with `tokenizer/`; weights are not needed.
    #[arg(long, default_value = "embedded", value_name = "DIR")]
    model: String,
}

/// Rank 0 alone works; nothing here is collective.
pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    if comm.rank() != 0 {
        return Ok(());
    }
    let files = ModelFiles::read_tokenizer(&model_location(&args.model)).or_mistake()?;
    let tokenizer = Tokenizer::from_files(&files).or_mistake()?;
    let mut out = BufWriter::new(io::stdout().lock());
    let mut input = io::stdin().lock();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if input.read_until(b'\n', &mut line).context("cannot read the prompts from standard input")? == 0 {
            break;
        }
        let bytes = line.strip_suffix(b"\n").unwrap_or(&line);
        let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        let prompt = std::str::from_utf8(bytes)
            .map_err(|e| anyhow!("standard input: line {number} is not UTF-8 (byte {})", e.valid_up_to() + 1));
        let encoded = match prompt {
            Ok(prompt) => tokenizer.encode(prompt)?,
            Err(e) => {
                out.flush()?;
                return Err(Failure::Mistake(e));
            }
        };
        if encoded.cut > 0 {
            log::warn!("line {number}: the prompt is too long, {}", encoded.cut_in_words());
        }
        let ids: Vec<String> = encoded.ids.iter().map(u32::to_string).collect();
        match writeln!(out, "[{}]", ids.join(", ")) {
            // the reader has seen enough (`| head`)
            Err(e) if e.kind() == ErrorKind::BrokenPipe => return Ok(()),
            result => result?,
        }
    }
    match out.flush() {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(()),
    }
}
