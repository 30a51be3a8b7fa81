//! Settings that can be left to the program: `"auto"`, which `run::fit` decides from the device and its memory. None of them
//! changes a result.

use serde::{Deserialize, Serialize};

use crate::models::recompute::Recomputed;

/// `model.gradient_checkpointing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub enum Checkpointing {
    Auto,
    Fixed(Recomputed),
}

/// `rollout.cuda_graph`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub enum Graphs {
    /// Where there is a GPU and memory for them.
    Auto,
    Fixed(bool),
}

const AUTO: &str = "auto";
const LEVEL_0: &str = "level_0";

/// As it stands in a config.
#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false or \"auto\"")]
enum Written {
    Truth(bool),
    Word(String),
}

impl TryFrom<Written> for Checkpointing {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        Ok(match written {
            Written::Truth(everything) => Checkpointing::Fixed(everything.into()),
            Written::Word(word) if word == AUTO => Checkpointing::Auto,
            Written::Word(word) if word == LEVEL_0 => Checkpointing::Fixed(Recomputed::Level0),
            Written::Word(word) => return Err(format!("{word:?} must be true, false, {LEVEL_0:?} or {AUTO:?}")),
        })
    }
}

impl From<Checkpointing> for Written {
    fn from(setting: Checkpointing) -> Self {
        match setting {
            Checkpointing::Auto => Written::Word(AUTO.into()),
            Checkpointing::Fixed(Recomputed::Level0) => Written::Word(LEVEL_0.into()),
            Checkpointing::Fixed(which) => Written::Truth(which == Recomputed::Everything),
        }
    }
}

impl TryFrom<Written> for Graphs {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        Ok(match written {
            Written::Truth(wanted) => Graphs::Fixed(wanted),
            Written::Word(word) if word == AUTO => Graphs::Auto,
            Written::Word(word) => return Err(format!("{word:?} must be true, false or {AUTO:?}")),
        })
    }
}

impl From<Graphs> for Written {
    fn from(setting: Graphs) -> Self {
        match setting {
            Graphs::Auto => Written::Word(AUTO.into()),
            Graphs::Fixed(wanted) => Written::Truth(wanted),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load::{parse, EMBEDDED_JOINT};

    #[test]
    fn old_booleans_and_new_words_are_read_and_written() {
        for (written, expected) in [
            ("true", Checkpointing::Fixed(Recomputed::Everything)),
            ("false", Checkpointing::Fixed(Recomputed::Nothing)),
            ("'level_0'", Checkpointing::Fixed(Recomputed::Level0)),
            ("'auto'", Checkpointing::Auto),
        ] {
            let set = [format!("model.gradient_checkpointing={written}")];
            let config = parse(EMBEDDED_JOINT, "joint", &set).unwrap();
            assert_eq!(config.model.gradient_checkpointing, expected);
            let again = parse(&toml::to_string(&config).unwrap(), "again", &[]).unwrap();
            assert_eq!(again, config, "{written}");
        }
        for (written, expected) in
            [("true", Graphs::Fixed(true)), ("false", Graphs::Fixed(false)), ("auto", Graphs::Auto)]
        {
            let config = parse(EMBEDDED_JOINT, "joint", &[format!("rollout.cuda_graph={written}")]).unwrap();
            assert_eq!(config.rollout.cuda_graph, expected);
            assert_eq!(parse(&toml::to_string(&config).unwrap(), "again", &[]).unwrap(), config, "{written}");
        }
    }

    #[test]
    fn other_words_are_named_with_their_key() {
        for (set, wanted) in [
            ("model.gradient_checkpointing='all'", "\"all\" must be true, false, \"level_0\" or \"auto\""),
            ("rollout.cuda_graph='level_0'", "\"level_0\" must be true, false or \"auto\""),
            ("rollout.cuda_graph=1", "expected true, false or \"auto\""),
        ] {
            let error = format!("{:#}", parse(EMBEDDED_JOINT, "joint", &[set.to_string()]).unwrap_err());
            assert!(error.contains(wanted) && error.contains(set.split_once('=').unwrap().0), "{error}");
        }
    }

    /// A config as commit 60864e1 wrote it: without the keys that came later.
    #[test]
    fn a_config_without_the_newer_keys_is_read() {
        let mut table: toml::Table = EMBEDDED_JOINT.parse().unwrap();
        table["run"].as_table_mut().unwrap().remove("deterministic");
        table["model"].as_table_mut().unwrap().remove("frozen_compute");
        table["model"]["gradient_checkpointing"] = true.into();
        table["rollout"]["cuda_graph"] = false.into();
        // and can be given them
        let sets = ["run.deterministic=true".to_string(), "model.frozen_compute=bf16".to_string()];
        let config = parse(&table.to_string(), "old", &sets).unwrap();
        assert!(config.run.deterministic);
        assert_eq!(config.model.frozen_compute, crate::device::numerics::Precision::Bf16);
        let config = parse(&table.to_string(), "old", &[]).unwrap();
        assert!(!config.run.deterministic);
        assert_eq!(config.model.frozen_compute, crate::device::numerics::Precision::Tf32);
        assert_eq!(config.model.gradient_checkpointing, Checkpointing::Fixed(Recomputed::Everything));
        assert_eq!(config.rollout.cuda_graph, Graphs::Fixed(false));
    }
}
