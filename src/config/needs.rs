//! The files, folders and programs that a config names, and which of them are not here. Asked before anything is opened, so
//! that all that is missing is told at once.

use std::{
    env,
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use anyhow::{bail, ensure, Result};

use super::{
    ClassifierConfig, Config, EvalConfig, EvalSet, PairData, PretrainMode, PromptConfig, RewardConfig, TaskConfig,
};
use crate::miniature::Edition;

/// What a path must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    File,
    Folder,
    /// A folder with a tokenizer, or a file that is one.
    FolderOrFile,
    /// A path, or a name to be looked for on the PATH.
    Program,
}

/// Something that a setting names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// The setting's key, as `--set` takes it.
    pub key: String,
    pub path: String,
    kind: Kind,
}

/// A need that cannot be met here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    pub key: String,
    /// The path and what is wrong with it.
    pub what: String,
}

/// The needs of a part of a config, with the part's key.
struct Needs {
    key: String,
    all: Vec<Need>,
}

impl Needs {
    fn of(key: impl Into<String>) -> Self {
        Needs { key: key.into(), all: Vec::new() }
    }

    fn add(mut self, kind: Kind, name: &str, path: &str) -> Self {
        self.all.push(Need { key: format!("{}.{name}", self.key), path: path.to_string(), kind });
        self
    }

    fn file(self, name: &str, path: &str) -> Self {
        self.add(Kind::File, name, path)
    }

    /// The files of a CLIP; what is left out is looked for beside the weights.
    fn clip(self, weights: &str, config: &str, tokenizer: &str) -> Self {
        let needs = self.file("weights", weights).optional("config", config);
        match tokenizer {
            "" => needs,
            path => needs.add(Kind::FolderOrFile, "tokenizer", path),
        }
    }

    /// A file that may be left out, as "".
    fn optional(self, name: &str, path: &str) -> Self {
        if path.is_empty() {
            self
        } else {
            self.file(name, path)
        }
    }
}

impl Config {
    /// Everything that training needs.
    pub fn needs(&self) -> Vec<Need> {
        let tasks = self.tasks.iter().flat_map(TaskConfig::needs);
        self.model_need().into_iter().chain(tasks).chain(self.pair_needs()).collect()
    }

    /// The model's folder; none where it is embedded.
    pub fn model_need(&self) -> Option<Need> {
        model("model.path", &self.model.path)
    }

    /// What the pretraining pairs need.
    pub fn pair_needs(&self) -> Vec<Need> {
        let needs = Needs::of("pretrain.data");
        match &self.pretrain.data {
            _ if self.pretrain.mode == PretrainMode::Off => needs,
            PairData::Miniature { .. } => needs,
            PairData::Webdataset(w) => {
                needs.add(Kind::Folder, "folder", &w.folder).optional("drop_words", &w.drop_words)
            }
            PairData::Encoded { folder } => needs.add(Kind::Folder, "folder", folder),
        }
        .all
    }
}

impl TaskConfig {
    /// What its prompts and its reward need.
    pub fn needs(&self) -> Vec<Need> {
        let key = format!("task.{}", self.name);
        [self.prompts.needs(&key), self.reward.needs(&format!("{key}.reward"))].concat()
    }

    /// Whether making it opens no file and starts or asks no program.
    pub fn is_self_contained(&self) -> bool {
        self.needs().is_empty() && !self.reward.asks_server()
    }
}

impl EvalConfig {
    /// Everything that the evaluation needs: every model, the files of every set.
    pub fn needs(&self) -> Vec<Need> {
        let models = self.models.iter().flat_map(|m| {
            let key = format!("model.{}", m.name);
            model(&format!("{key}.path"), &m.path).into_iter().chain(Needs::of(key).optional("lora", &m.lora).all)
        });
        models.chain(self.sets.iter().flat_map(EvalSet::needs)).collect()
    }
}

impl EvalSet {
    fn needs(&self) -> Vec<Need> {
        let key = format!("set.{}", self.name);
        let of_metrics = self.metrics.iter().map(|m| m.reward.needs(&format!("{key}.metrics.{}.reward", m.name)));
        self.prompts.needs(&key).into_iter().chain(of_metrics.flatten()).collect()
    }
}

impl PromptConfig {
    /// `of`: the key of what they are the prompts of.
    pub fn needs(&self, of: &str) -> Vec<Need> {
        let needs = Needs::of(format!("{of}.prompts"));
        match self {
            PromptConfig::MiniatureCompositions {}
            | PromptConfig::MiniatureOccupations {}
            | PromptConfig::MiniaturePlaces {}
            | PromptConfig::MiniaturePeople {}
            | PromptConfig::MiniatureWorkers {}
            | PromptConfig::MiniaturePairsInPlaces {}
            | PromptConfig::Compositions { .. }
            | PromptConfig::Occupations { .. } => needs,
            PromptConfig::Text(t) => needs.file("path", &t.path).optional("drop_words", &t.drop_words),
            PromptConfig::Tsv(t) | PromptConfig::Csv(t) => {
                needs.file("path", &t.path).optional("drop_words", &t.drop_words)
            }
            PromptConfig::Parquet(p) => needs.file("path", &p.path).optional("drop_words", &p.drop_words),
        }
        .all
    }
}

impl RewardConfig {
    /// `key`: the reward's own.
    pub fn needs(&self, key: &str) -> Vec<Need> {
        let needs = Needs::of(key);
        match self {
            RewardConfig::MiniatureComposition {}
            | RewardConfig::Colorfulness {}
            | RewardConfig::MiniatureLikeness {}
            | RewardConfig::JpegCompressibility {}
            | RewardConfig::JpegIncompressibility {}
            | RewardConfig::Random {} => needs,
            // it may be started later
            RewardConfig::Server(_) => needs,
            RewardConfig::Composition(u) => needs.file("weights", &u.weights).file("labels", &u.labels),
            RewardConfig::Parity { classifier } => match classifier {
                ClassifierConfig::MiniatureSkinTone {} => needs,
                ClassifierConfig::SkinTone(s) => needs.file("classifier.face_model", &s.face_model),
                ClassifierConfig::Torchscript { path, .. } => needs.file("classifier.path", path),
            },
            RewardConfig::ImageReward(i) => needs.file("weights", &i.weights).file("vocabulary", &i.vocabulary),
            RewardConfig::Aesthetic(a) => needs.file("clip", &a.clip).optional("head", &a.head),
            RewardConfig::PickScore(s) => needs.clip(&s.weights, &s.config, &s.tokenizer),
            RewardConfig::Hps(s) => needs.clip(&s.weights, &s.config, &s.tokenizer),
            RewardConfig::ClipScore(s) => needs.clip(&s.weights, &s.config, &s.tokenizer),
            RewardConfig::Torchscript { path } => needs.file("path", path),
            RewardConfig::Command(c) => match c.command.first() {
                Some(program) => needs.add(Kind::Program, "command", program),
                None => needs,
            },
            RewardConfig::Sum { parts, .. } => {
                let parts =
                    parts.iter().enumerate().flat_map(|(i, p)| p.reward.needs(&format!("{key}.parts.{i}.reward")));
                Needs { all: parts.collect(), ..needs }
            }
        }
        .all
    }
}

impl RewardConfig {
    fn asks_server(&self) -> bool {
        match self {
            RewardConfig::Server(_) => true,
            RewardConfig::Sum { parts, .. } => parts.iter().any(|part| part.reward.asks_server()),
            _ => false,
        }
    }
}

fn model(key: &str, path: &str) -> Option<Need> {
    Edition::of_model(path).is_none().then(|| Need { key: key.to_string(), path: path.to_string(), kind: Kind::Folder })
}

impl Need {
    /// The same, said of one config among several.
    pub fn of(self, which: &str) -> Need {
        Need { key: format!("{which}: {}", self.key), ..self }
    }

    /// What is wrong with it on this machine.
    fn missing(&self) -> Option<Missing> {
        let what = match self.kind {
            Kind::File => file(&self.path),
            Kind::Folder => folder(&self.path),
            Kind::FolderOrFile if Path::new(&self.path).is_dir() => folder(&self.path),
            Kind::FolderOrFile => file(&self.path),
            Kind::Program => program(&self.path),
        };
        what.err().map(|e| Missing { key: self.key.clone(), what: e.to_string() })
    }
}

/// Those of the needs that are not here.
pub fn missing(needs: &[Need]) -> Vec<Missing> {
    needs.iter().filter_map(Need::missing).collect()
}

/// # Errors
/// All that is missing, in one line.
pub fn ensure_here(needs: &[Need]) -> Result<()> {
    let missing = missing(needs);
    ensure!(missing.is_empty(), "{}", in_words(&missing));
    Ok(())
}

/// What is missing, in one line.
pub fn in_words(missing: &[Missing]) -> String {
    let each: Vec<String> = missing.iter().map(|m| format!("{}: {}", m.key, m.what)).collect();
    match each.len() {
        1 => each[0].clone(),
        count => format!("{count} things that the config names are missing: {}", each.join("; ")),
    }
}

fn kind_of(path: &str) -> Result<fs::Metadata> {
    match fs::metadata(path) {
        Ok(found) => Ok(found),
        Err(_) if path.is_empty() => bail!("no path is given"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && fs::symlink_metadata(path).is_ok() => {
            bail!("{path} is a link to something that does not exist")
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => bail!("{path} does not exist"),
        Err(e) => bail!("cannot read {path}: {e}"),
    }
}

fn file(path: &str) -> Result<()> {
    let found = kind_of(path)?;
    ensure!(!found.is_dir(), "{path} is a folder, a file is wanted");
    // a pipe is opened once, by who reads it
    if found.is_file() {
        ensure!(found.len() > 0, "{path} is empty");
        if let Err(e) = File::open(path) {
            bail!("cannot read {path}: {e}");
        }
    }
    Ok(())
}

fn folder(path: &str) -> Result<()> {
    let found = kind_of(path)?;
    ensure!(found.is_dir(), "{path} is a file, a folder is wanted");
    match fs::read_dir(path) {
        Ok(mut entries) => ensure!(entries.next().is_some(), "{path} is empty"),
        Err(e) => bail!("cannot read {path}: {e}"),
    }
    Ok(())
}

fn program(name: &str) -> Result<()> {
    let runs = |path: &Path| fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    if name.contains('/') {
        let found = kind_of(name)?;
        ensure!(!found.is_dir(), "{name} is a folder, a program is wanted");
        ensure!(
            runs(Path::new(name)),
            "{name} is not executable (chmod +x), or its interpreter should come first (command = [\"python3\", …])"
        );
        return Ok(());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let here = env::split_paths(&path).any(|folder| runs(&folder.join(name)));
    let beside =
        if Path::new(name).is_file() { format!(", but in this folder: write \"./{name}\"") } else { String::new() };
    ensure!(here, "there is no program {name} on the PATH{beside}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load::parse;

    fn shipped(name: &str) -> String {
        std::fs::read_to_string(format!("{}/slurm/{name}.toml", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    #[test]
    fn a_config_lists_all_that_it_names() {
        let joint = parse(&shipped("joint"), "joint", &[]).unwrap();
        let keys: Vec<String> = joint.needs().into_iter().map(|need| need.key).collect();
        let wanted = [
            "model.path",
            "task.preference.prompts.path",
            "task.preference.reward.weights",
            "task.preference.reward.vocabulary",
            "task.parity.prompts.path",
            "task.parity.prompts.drop_words",
            "task.parity.reward.classifier.face_model",
            "task.composition.reward.weights",
            "task.composition.reward.labels",
            "pretrain.data.folder",
        ];
        assert!(wanted.iter().all(|key| keys.iter().any(|own| own == key)), "{keys:?}");
        assert_eq!(keys.len(), wanted.len(), "{keys:?}");
        let off = parse(&shipped("joint"), "joint", &["pretrain.mode=off".to_string()]).unwrap();
        assert_eq!(off.needs().len(), wanted.len() - 1);
        assert!(parse(&shipped("miniature-joint"), "joint", &[]).unwrap().needs().is_empty());
        let evaluation: EvalConfig = toml::from_str(&shipped("eval-preference")).unwrap();
        let keys: Vec<String> = evaluation.needs().into_iter().map(|need| need.key).collect();
        let models = keys.iter().filter(|key| key.starts_with("model.")).count();
        assert!(models == evaluation.models.len() && keys.iter().any(|key| key.ends_with(".prompts.path")), "{keys:?}");
    }

    #[test]
    fn what_is_wrong_with_a_path_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(at("empty"), b"").unwrap();
        std::fs::write(at("full"), b"x").unwrap();
        std::fs::create_dir(at("inner")).unwrap();
        std::os::unix::fs::symlink(at("gone"), at("link")).unwrap();
        let wrong = |kind: Kind, path: &str| {
            let need = Need { key: "a.b".into(), path: path.into(), kind };
            need.missing().map_or("nothing".to_string(), |m| m.what)
        };
        for (kind, name, wanted) in [
            (Kind::File, "none", "does not exist"),
            (Kind::File, "empty", "is empty"),
            (Kind::File, "inner", "is a folder, a file is wanted"),
            (Kind::File, "link", "is a link to something that does not exist"),
            (Kind::File, "full", "nothing"),
            (Kind::File, "full/inside", "Not a directory"),
            (Kind::Folder, "full", "is a file, a folder is wanted"),
            (Kind::Folder, "inner", "is empty"),
            (Kind::Program, "full", "is not executable"),
            (Kind::Program, "none", "does not exist"),
        ] {
            let found = wrong(kind, &at(name));
            assert!(found.contains(wanted), "{kind:?} {name}: {found}");
        }
        assert_eq!(wrong(Kind::Program, "sh"), "nothing");
        assert!(wrong(Kind::Program, "no-such-program").contains("on the PATH"));
        let both = [at("none"), at("empty")].map(|path| Need { key: "k".into(), path, kind: Kind::File });
        let e = ensure_here(&both).unwrap_err().to_string();
        assert!(e.starts_with("2 things") && e.contains("does not exist; k: ") && !e.contains('\n'), "{e}");
    }
}
