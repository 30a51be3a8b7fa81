//! Where a task's prompts come from. Paths are relative to the folder that rldiff is started in.

use serde::{Deserialize, Serialize};

/// Prompt sources. `held_out` prompts (or names) are never trained on; `split_seed` chooses them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "snake_case", deny_unknown_fields)]
pub enum PromptConfig {
    /// Two objects of the miniature and a relation.
    MiniatureCompositions {},
    /// Portraits of the miniature's occupations.
    MiniatureOccupations {},
    /// An object of the miniature in a place.
    MiniaturePlaces {},
    /// Captions of the miniature's people, which name no occupation.
    MiniaturePeople {},
    /// The miniature's occupations with an object; a test.
    MiniatureWorkers {},
    /// Two objects of the miniature in a place; a test.
    MiniaturePairsInPlaces {},
    /// Two of the paper's 532 objects and a relation; the paper holds 82 objects out.
    Compositions { held_out: usize, split_seed: u64 },
    /// Portraits of the paper's 100 occupations.
    Occupations { held_out: usize, split_seed: u64 },
    /// Lines, or JSON lines, of a file.
    Text(TextPrompts),
    /// A column of a tab-separated file without quoting.
    Tsv(TablePrompts),
    /// A column of a comma-separated file with RFC 4180's quoting.
    Csv(TablePrompts),
    /// A column of a parquet file.
    Parquet(ParquetPrompts),
}

/// One prompt per line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextPrompts {
    pub path: String,
    /// Key of the prompt where every line is a JSON object; "" for plain lines.
    pub key: String,
    /// Key of the list of the objects that the prompt names, for the composition reward; left out where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objects_key: Option<String>,
    pub held_out: usize,
    pub split_seed: u64,
    /// File of words and phrases, one per line; a prompt with one of them is dropped. "" for none.
    pub drop_words: String,
}

/// One prompt per row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TablePrompts {
    pub path: String,
    /// Name of the column in the first row.
    pub column: String,
    pub held_out: usize,
    pub split_seed: u64,
    /// As in [`TextPrompts`].
    pub drop_words: String,
}

/// One prompt per row, with scores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParquetPrompts {
    pub path: String,
    /// Name of the column, in any case.
    pub column: String,
    /// Columns of scores; a row is left out where one of them is above `nsfw_max` or missing.
    pub nsfw_columns: Vec<String>,
    pub nsfw_max: f64,
    pub held_out: usize,
    pub split_seed: u64,
    /// As in [`TextPrompts`].
    pub drop_words: String,
}
