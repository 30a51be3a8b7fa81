//! Texts → token ids up to the end token, whose row is the text's.

use std::{io::Read, path::Path};

use anyhow::{anyhow, ensure, Context, Result};
use flate2::read::GzDecoder;
use tch::Tensor;

use super::{shape::Plan, Files};
use crate::models::{
    folder::{ModelFiles, ModelLocation},
    tokenizer::{TextRules, Tokenizer},
    tokenizer_files::from_merges,
};

/// A tokenizer that fits a text tower.
pub struct Reader {
    tokenizer: Tokenizer,
    /// [`Plan::end`].
    end: Option<u32>,
}

impl Reader {
    /// # Errors
    /// Files that cannot be read, or of another vocabulary than the text tower's.
    pub fn load(files: Files, rules: TextRules, plan: &Plan) -> Result<Reader> {
        let beside = Path::new(files.weights).parent().filter(|folder| !folder.as_os_str().is_empty());
        let path = match files.tokenizer {
            "" => beside.unwrap_or(Path::new(".")),
            path => Path::new(path),
        };
        let shown = path.display();
        let tokenizer = match path.is_file() {
            true => Tokenizer::with_rules(&list_of_merges(path)?, rules)?,
            false => Tokenizer::with_rules(&ModelFiles::read_tokenizer(&ModelLocation::Disk(path.into()))?, rules)?,
        };
        for note in &tokenizer.notes {
            log::warn!("{shown}: {note}");
        }
        let (tokens, vocabulary) = (i64::from(tokenizer.largest.0) + 1, plan.text.vocab_size);
        ensure!(
            tokens == vocabulary,
            "{shown}: {tokens} tokens, {} has embeddings of {vocabulary}: the tokenizer of another model",
            files.weights
        );
        let wanted = plan.end.unwrap_or(i64::from(tokenizer.largest.0));
        ensure!(
            i64::from(tokenizer.end()) == wanted,
            "{shown}: a text ends with the token {}, {} looks for {wanted}: the tokenizer of another model",
            tokenizer.end(),
            files.weights
        );
        ensure!(
            tokenizer.length as i64 <= plan.text.max_position_embeddings,
            "{shown}: texts of {} tokens, {} has {} positions",
            tokenizer.length,
            files.weights,
            plan.text.max_position_embeddings
        );
        Ok(Reader { tokenizer, end: plan.end.map(|id| id as u32) })
    }

    /// i64 `[1, tokens]`, up to the first end token: the towers are causal, so what follows has no influence. Too long a text
    /// is cut and ended, as both libraries do.
    pub fn ids(&self, text: &str) -> Result<Tensor> {
        let ids = self.tokenizer.encode(text)?.ids;
        let end = self.end.or_else(|| ids.iter().copied().max());
        let first = ids.iter().position(|&id| Some(id) == end).context("a text without an end token")?;
        let ids: Vec<i64> = ids[..=first].iter().map(|&id| i64::from(id)).collect();
        Ok(Tensor::from_slice(&ids).view([1, -1]))
    }
}

/// open_clip's list of merges, as it is or packed by gzip.
fn list_of_merges(path: &Path) -> Result<ModelFiles> {
    let origin = path.display().to_string();
    let read = || -> Result<String> {
        let bytes = std::fs::read(path)?;
        let mut text = String::new();
        match bytes.starts_with(&[0x1f, 0x8b]) {
            true => drop(GzDecoder::new(bytes.as_slice()).read_to_string(&mut text)?),
            false => text = String::from_utf8(bytes).map_err(|_| anyhow!("it is not UTF-8"))?,
        }
        Ok(text)
    };
    let text = read().with_context(|| format!("cannot read {origin}"))?;
    let texts = from_merges(&text).with_context(|| format!("{origin} is no list of merges"))?;
    Ok(ModelFiles { texts, origin, ..ModelFiles::default() })
}
