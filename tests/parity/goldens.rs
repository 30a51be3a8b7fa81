//! The reference numbers: files, tolerances, comparisons, and what was not compared.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use rldiff::{
    diffusion::schedule::Schedule,
    models::{
        folder::{ModelFiles, ModelLocation},
        pipeline::Pipeline,
        weights::read_safetensors,
    },
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// Beginnings and ends of names that are no result of rldiff.
const NOT_COMPARED: &[(&str, &str)] = &[
    ("", ".fp32run"),
    // activations inside the networks, there to find an error with
    ("debug.", ""),
    // gradients for summed log-probabilities; rldiff's are means
    ("sum.grad", ""),
    // how the set was made
    ("log_ratio_target", ""),
    ("rewards", ""),
    ("final_alpha_cumprod", ""),
    ("betas_f64", ""),
    ("alphas_cumprod_f64", ""),
];

pub struct Goldens {
    pub dir: PathBuf,
    pub tolerances: Value,
    /// What the set should hold: objects with `file` and `name`.
    pub listing: Vec<Value>,
    pub guidance_scale: f64,
    pub clip_range: f64,
    pub failures: Vec<String>,
}

pub fn json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A set of the rewards on CLIP, not of pipelines.
fn is_of_rewards(dir: &Path) -> bool {
    dir.join("goldens/pictures.json").is_file()
}

pub fn goldens() -> Option<Goldens> {
    let Some(dir) = std::env::var_os("RLDIFF_GOLDENS").map(PathBuf::from) else {
        eprintln!("SKIPPED: RLDIFF_GOLDENS is not set (folder of diffusers reference numbers)");
        return None;
    };
    if is_of_rewards(&dir) {
        eprintln!("SKIPPED: {} holds numbers of rewards, none of pipelines", dir.display());
        return None;
    }
    Some(open(dir))
}

/// RLDIFF_GOLDENS where it is such a set, else the part of one that the project has.
pub fn reward_goldens() -> Goldens {
    let set = std::env::var_os("RLDIFF_GOLDENS").map(PathBuf::from).filter(|dir| is_of_rewards(dir));
    let part = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/rewards");
    let dir = set.unwrap_or_else(|| part.into());
    for variant in ["sd2", "sd15"].iter().filter(|variant| dir.join("goldens").join(variant).is_dir()) {
        eprintln!("SKIPPED: {}/goldens/{variant}: objectives are not compared with the rewards", dir.display());
    }
    open(dir)
}

fn open(dir: PathBuf) -> Goldens {
    let tolerances = json(&dir.join("TOLERANCES.json"))["gaps"].take();
    let mut manifest = json(&dir.join("MANIFEST.json"));
    let (conventions, listing) = (manifest["conventions"].take(), manifest["tensors"].take());
    let listing = listing.as_array().expect("MANIFEST.json: tensors").clone();
    let number = |key: &str| match conventions[key].as_f64() {
        // rewards have neither
        None if is_of_rewards(&dir) => f64::NAN,
        number => number.unwrap_or_else(|| panic!("MANIFEST.json: conventions.{key}")),
    };
    let (guidance_scale, clip_range) = (number("guidance"), number("clip_range"));
    Goldens { dir, tolerances, listing, guidance_scale, clip_range, failures: Vec::new() }
}

/// The tensors of one reference file, and which of them were used.
pub struct File {
    /// `sd2/rl`
    pub prefix: String,
    pub tensors: BTreeMap<String, Tensor>,
    pub used: RefCell<BTreeSet<String>>,
}

impl File {
    pub fn get(&self, name: &str) -> &Tensor {
        self.used.borrow_mut().insert(name.to_string());
        self.tensors.get(name).unwrap_or_else(|| panic!("{}/{name}: the reference tensor is missing", self.prefix))
    }

    pub fn names(&self, start: &str) -> Vec<String> {
        let plain = |name: &&String| name.starts_with(start) && !name.ends_with(".fp32run");
        self.tensors.keys().filter(plain).cloned().collect()
    }
}

pub fn doubles(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(&tensor.to_kind(Kind::Double).reshape([-1])).unwrap()
}

/// Largest difference and relative L2 difference.
pub fn gaps(got: &Tensor, expected: &Tensor) -> (f64, f64) {
    let (got, expected) = (got.to_kind(Kind::Double), expected.to_kind(Kind::Double));
    let difference = got - &expected;
    let norm = |t: &Tensor| t.square().sum(Kind::Double).sqrt().double_value(&[]);
    (difference.abs().max().double_value(&[]), norm(&difference) / norm(&expected).max(1e-300))
}

impl Goldens {
    /// `sd2` for a folder `sd2-tiny`.
    pub fn variants(&self) -> Vec<String> {
        let names = fs::read_dir(&self.dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut variants: Vec<String> =
            names.filter_map(|name| Some(name.strip_suffix("-tiny")?.to_string())).collect();
        variants.sort();
        assert!(!variants.is_empty(), "{} holds no folder VARIANT-tiny", self.dir.display());
        variants
    }

    pub fn file(&self, variant: &str, file: &str) -> File {
        self.flat_file(&format!("{variant}/{file}"))
    }

    pub fn flat_file(&self, prefix: &str) -> File {
        let path = self.dir.join(format!("goldens/{prefix}.safetensors"));
        let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let tensors = read_safetensors(&bytes, &path.display().to_string()).unwrap();
        File { prefix: prefix.to_string(), tensors, used: RefCell::default() }
    }

    pub fn pipeline(&self, variant: &str) -> (Pipeline, Schedule) {
        let location = ModelLocation::Disk(self.dir.join(format!("{variant}-tiny")));
        let pipeline = Pipeline::from_files(ModelFiles::read(&location).unwrap(), Device::Cpu).unwrap();
        let schedule = Schedule::of_model(&pipeline.scheduler).unwrap();
        (pipeline, schedule)
    }

    /// Prints one line: name, error, tolerance, percent of it used.
    pub fn line(&mut self, name: &str, measure: &str, error: f64, tolerance: f64) -> f64 {
        let used = if error == 0.0 { 0.0 } else { 100.0 * error / tolerance };
        println!("{name:<70} {measure:<8} {error:9.2e}  tolerance {tolerance:9.2e}  {used:6.1} %");
        used
    }

    pub fn judge(&mut self, name: &str, measure: &str, error: f64, tolerance: f64) {
        let used = self.line(name, measure, error, tolerance);
        if used.is_nan() || used > 100.0 {
            self.failures.push(name.to_string());
        }
    }

    /// The tolerance `measure` of `name`; its absence is a failure.
    pub fn tolerance(&mut self, name: &str, measure: &str) -> f64 {
        let found = self.tolerances[name][measure].as_f64();
        found.unwrap_or_else(|| {
            self.failures.push(format!("{name} (no tolerance {measure})"));
            f64::NAN
        })
    }

    /// Compares with a tensor of `file` under the tolerance of its name.
    pub fn compare(&mut self, file: &File, name: &str, got: &Tensor) {
        let full = format!("{}/{name}", file.prefix);
        self.compare_values(&full, got, file.get(name));
    }

    pub fn compare_values(&mut self, name: &str, got: &Tensor, expected: &Tensor) {
        assert_eq!(got.size(), expected.size(), "{name}");
        let (largest, relative) = gaps(got, expected);
        let bound = self.tolerance(name, "suggest_max_abs");
        match self.tolerances[name]["suggest_rel_l2"].as_f64() {
            Some(relative_bound) if relative / relative_bound < largest / bound => {
                self.judge(name, "rel. L2", relative, relative_bound);
            }
            _ => self.judge(name, "largest", largest, bound),
        }
    }

    /// Bytes may be off by one, in a few pixels: ten times the share that PyTorch's own f32 run has, or one in 1000.
    pub fn compare_bytes(&mut self, file: &File, name: &str, got: &Tensor) {
        let full = format!("{}/{name}", file.prefix);
        let expected = file.get(name).to_kind(Kind::Int);
        assert_eq!(got.size(), expected.size(), "{full}");
        let difference = (got.to_kind(Kind::Int) - expected).abs();
        let share = difference.not_equal(0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        let torch = self.tolerances[&full]["mismatch_fraction"].as_f64().unwrap_or(1e-4);
        self.judge(&full, "share≠", share, 10.0 * torch.max(1e-4));
        self.judge(&full, "largest", difference.max().double_value(&[]), 1.0);
    }

    /// A tensor without a tolerance in the table: `bound` on the largest difference, 0 for the same bits.
    pub fn compare_within(&mut self, file: &File, name: &str, got: &Tensor, bound: f64) {
        let expected = file.get(name);
        assert_eq!(got.size(), expected.size(), "{}/{name}", file.prefix);
        self.judge(&format!("{}/{name}", file.prefix), "largest", gaps(got, expected).0, bound);
    }

    /// Fails for every reference tensor that was not used, and for every one of the manifest that is not there.
    pub fn all_used(&mut self, file: &File) {
        let path = format!("goldens/{}.safetensors", file.prefix);
        for entry in self.listing.iter().filter(|entry| entry["file"] == path.as_str()) {
            let name = entry["name"].as_str().expect("MANIFEST.json: a name");
            if !file.tensors.contains_key(name) {
                self.failures.push(format!("{}/{name} (in MANIFEST.json, not in the file)", file.prefix));
            }
        }
        let used = file.used.borrow();
        for name in file.tensors.keys().filter(|name| !used.contains(*name)) {
            if !NOT_COMPARED.iter().any(|(start, end)| name.starts_with(start) && name.ends_with(end)) {
                self.failures.push(format!("{}/{name} (not compared)", file.prefix));
            }
        }
    }

    pub fn finish(self) {
        assert!(self.failures.is_empty(), "over tolerance or missing: {:#?}", self.failures);
    }
}
