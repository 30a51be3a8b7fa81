//! `rldiff tokenize`: what a model's tokenizer makes of prompts.

use std::io::{self, BufRead, BufReader};

use anyhow::{anyhow, Context};

use super::{Failure, OrMistake};
use crate::{
    comm::Communicator,
    models::{folder::ModelFiles, tokenizer::Tokenizer},
    run::model_location,
    streams,
};

#[derive(clap::Args)]
pub struct Args {
    /// `miniature`, or a folder with `tokenizer/`; weights are not needed.
    #[arg(long, default_value = "miniature", value_name = "DIR")]
    model: String,
}

/// Bytes of output that are gathered while there is input.
const PRINTED_AT_ONCE: usize = 1 << 13;

/// Rank 0 alone works; nothing here is collective.
pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    if comm.rank() != 0 {
        return Ok(());
    }
    let files = ModelFiles::read_tokenizer(&model_location(&args.model)).or_mistake()?;
    let tokenizer = Tokenizer::from_files(&files).or_mistake()?;
    let mut out = String::new();
    let mut input = BufReader::new(io::stdin().lock());
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
                streams::print(format_args!("{out}"));
                return Err(Failure::Mistake(e));
            }
        };
        if encoded.cut > 0 {
            log::warn!("line {number}: the prompt is too long, {}", encoded.cut_in_words());
        }
        let ids: Vec<String> = encoded.ids.iter().map(u32::to_string).collect();
        out += &format!("[{}]\n", ids.join(", "));
        // whoever asks prompt by prompt is answered at once
        if out.len() >= PRINTED_AT_ONCE || input.buffer().is_empty() {
            streams::print(format_args!("{out}"));
            out.clear();
        }
        if streams::is_gone() {
            break;
        }
    }
    streams::print(format_args!("{out}"));
    Ok(())
}
