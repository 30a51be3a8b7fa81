//! The arguments by which commands take a config.

use std::path::PathBuf;

use anyhow::{anyhow, Context, Result};

use crate::{
    comm::Communicator,
    config::{
        load::{self, Experiment},
        Config,
    },
};

#[derive(clap::Args, Clone, Debug)]
pub struct ConfigArgs {
    /// Experiment file; without one, the embedded miniature's joint experiment (on more than 8 ranks with the paper's 128
    /// lanes of 16 samples).
    pub config: Option<PathBuf>,
    /// Change one setting: section.key=value, or task.NAME.key=value (in an evaluation set.NAME.key=value). May be given
    /// several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl ConfigArgs {
    /// The validated config; rank 0 reads, and all ranks get the same config or the same error.
    pub fn load(&self, comm: &dyn Communicator) -> Result<Config> {
        let mut message = Vec::new();
        if comm.rank() == 0 {
            let experiment = self.experiment(comm.size());
            let loaded = load::load(experiment, &self.set).and_then(|config| {
                config.validate().with_context(|| experiment.origin())?;
                Ok(toml::to_string(&config)?)
            });
            message = serde_json::to_vec(&loaded.map_err(|e| format!("{e:#}")))?;
        }
        comm.broadcast_bytes(&mut message, 0)?;
        let text: Result<String, String> = serde_json::from_slice(&message)?;
        load::parse(&text.map_err(|e| anyhow!(e))?, "config from rank 0", &[])
    }

    /// Which experiment the arguments name for so many ranks.
    pub fn experiment(&self, ranks: usize) -> Experiment<'_> {
        Experiment::of(self.config.as_deref(), &self.set, ranks)
    }
}
