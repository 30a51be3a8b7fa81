//! A TorchScript file as a reward or as a classifier: pictures in, scores out.

use anyhow::{ensure, Context, Result};
use tch::{CModule, Device, Kind, Tensor};

use super::{check_batch, parity::Classifier, DifferentiableReward, Reward, Scores};
use crate::prompts::Prompt;

/// A loaded module; `forward` takes f32 `[B, 3, H, W]` in [0, 1].
struct Module {
    path: String,
    module: CModule,
    /// Where its weights are.
    device: Device,
    /// Bytes of its weights.
    bytes: u64,
}

impl Module {
    /// # Errors
    /// A file that cannot be read or is no TorchScript.
    fn load(path: &str) -> Result<Module> {
        std::fs::File::open(path).with_context(|| format!("cannot read {path}"))?;
        let module = CModule::load(path).map_err(|e| {
            let text = e.to_string();
            anyhow::anyhow!("{path} is no TorchScript module: {}", text.lines().next().unwrap_or_default())
        })?;
        let mut bytes = 0;
        for (_, parameter) in module.named_parameters().with_context(|| format!("parameters of {path}"))? {
            bytes += parameter.numel() as u64 * size_of::<f32>() as u64;
            let _ = parameter.set_requires_grad(false);
        }
        Ok(Module { path: path.to_owned(), module, device: Device::Cpu, bytes })
    }

    /// Two grey pictures: the module may want another size, or give another shape.
    fn check_size(&mut self, height: i64, width: i64, columns: usize) -> Result<()> {
        let grey = Tensor::full([2, 3, height, width], 0.5, (Kind::Float, Device::Cpu));
        let tried = self.forward(&grey, columns).map(drop);
        tried.with_context(|| format!("tried with pictures of {width}×{height} pixels"))
    }

    /// The output as f32 `[n, columns]` on the CPU.
    fn forward(&mut self, images: &Tensor, columns: usize) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        Ok(self.differentiable_forward(images, columns)?.to_device(Device::Cpu))
    }

    /// The output as f32 `[n, columns]` where the pictures are.
    fn differentiable_forward(&mut self, images: &Tensor, columns: usize) -> Result<Tensor> {
        if self.device != images.device() {
            self.device = images.device();
            self.module.to(self.device, Kind::Float, false);
        }
        let n = images.size()[0];
        let output = self.module.forward_ts(&[images.to_kind(Kind::Float)]).map_err(|e| {
            let text = e.to_string();
            let last = text.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default();
            anyhow::anyhow!("{} failed: {last}", self.path)
        })?;
        let (size, columns) = (output.size(), columns as i64);
        ensure!(
            size == [n, columns] || (columns == 1 && size == [n]),
            "{} gave {size:?} for {n} pictures, [{n}, {columns}] is wanted",
            self.path
        );
        Ok(output.to_kind(Kind::Float).to_device(images.device()).view([n, columns]))
    }
}

/// The module's output is the reward; a value that is not finite marks a bad sample.
pub struct TorchScriptReward(Module);

impl TorchScriptReward {
    pub fn load(path: &str) -> Result<Self> {
        Ok(TorchScriptReward(Module::load(path)?))
    }
}

impl Reward for TorchScriptReward {
    fn name(&self) -> &str {
        "torchscript"
    }

    fn weight_bytes(&self) -> u64 {
        self.0.bytes
    }

    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores> {
        check_batch(images, prompts)?;
        let rewards = Vec::try_from(&self.0.forward(images, 1)?.view([-1]))?;
        Ok(Scores { rewards, ..Scores::default() })
    }

    fn check_size(&mut self, height: i64, width: i64) -> Result<()> {
        self.0.check_size(height, width, 1)
    }

    fn differentiable(&mut self) -> Option<&mut dyn DifferentiableReward> {
        Some(self)
    }
}

impl DifferentiableReward for TorchScriptReward {
    /// # Errors
    /// Also a module whose output does not depend differentiably on the pictures (it rounds or detaches them).
    fn rewards(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Tensor> {
        check_batch(images, prompts)?;
        let rewards = self.0.differentiable_forward(images, 1)?.view([-1]);
        ensure!(
            rewards.requires_grad() || !images.requires_grad(),
            "{} is not differentiable: its output has no gradient in the pictures",
            self.0.path
        );
        Ok(rewards)
    }
}

/// The module's output are logits `[B, classes]`; the largest one is the class. A picture with a logit that is not
/// finite has none.
pub struct TorchScriptClassifier {
    module: Module,
    classes: Vec<String>,
}

impl TorchScriptClassifier {
    pub fn load(path: &str, classes: &[String]) -> Result<Self> {
        Ok(TorchScriptClassifier { module: Module::load(path)?, classes: classes.to_vec() })
    }
}

impl Classifier for TorchScriptClassifier {
    fn classes(&self) -> Vec<String> {
        self.classes.clone()
    }

    fn check_size(&mut self, height: i64, width: i64) -> Result<()> {
        self.module.check_size(height, width, self.classes.len())
    }

    fn classify(&mut self, images: &Tensor) -> Result<Vec<Option<usize>>> {
        let logits = self.module.forward(images, self.classes.len())?;
        let values: Vec<f32> = Vec::try_from(&logits.view([-1]))?;
        Ok(values.chunks(self.classes.len()).map(largest).collect())
    }
}

fn largest(logits: &[f32]) -> Option<usize> {
    if logits.iter().any(|v| !v.is_finite()) {
        return None;
    }
    (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rewards::testing;

    /// A module file made by tracing `f` on two pictures.
    fn module_file(folder: &std::path::Path, f: fn(&Tensor) -> Tensor) -> String {
        let path = folder.join("module.pt").display().to_string();
        let mut traced = |inputs: &[Tensor]| vec![f(&inputs[0])];
        let input = Tensor::rand([2, 3, 6, 4], (Kind::Float, Device::Cpu));
        CModule::create_by_tracing("Reward", "forward", &[input], &mut traced).unwrap().save(&path).unwrap();
        path
    }

    fn images() -> Tensor {
        Tensor::arange(3 * 3 * 5 * 4, (Kind::Float, Device::Cpu)).view([3, 3, 5, 4]) / 180.0
    }

    #[test]
    fn the_output_is_the_reward() {
        let folder = tempfile::tempdir().unwrap();
        let path = module_file(folder.path(), |x| x.select(1, 0).mean_dim([1, 2].as_slice(), false, Kind::Float));
        let mut reward = TorchScriptReward::load(&path).unwrap();
        let scores = reward.score(&images(), &vec![Prompt::default(); 3]).unwrap().rewards;
        // plane means: 9.5/180 plus 60/180 per picture; f32 sums of 20 numbers, observed error 3e-8
        for (i, score) in scores.iter().enumerate() {
            assert!((f64::from(*score) - (9.5 + 60.0 * i as f64) / 180.0).abs() < 1e-6, "{scores:?}");
        }
        let log = module_file(folder.path(), |x| (x.select(1, 0).select(1, 0).select(1, 0) - 60.0 / 180.0).log());
        let scores = TorchScriptReward::load(&log).unwrap().score(&images(), &vec![Prompt::default(); 3]).unwrap();
        assert!(scores.rewards[0].is_nan() && scores.rewards[2].is_finite(), "{scores:?}");
    }

    #[test]
    fn gradients_flow_through_a_module_into_the_pictures() {
        let folder = tempfile::tempdir().unwrap();
        let path = module_file(folder.path(), |x| x.square().mean_dim([1, 2, 3].as_slice(), false, Kind::Float));
        let mut reward = TorchScriptReward::load(&path).unwrap();
        testing::against_finite_differences(&mut reward, &images().narrow(0, 1, 1), &Prompt::default());
        let path = module_file(folder.path(), |x| x.round().detach().select(1, 0).select(1, 0).select(1, 0));
        let mut flat = TorchScriptReward::load(&path).unwrap();
        let pictures = images().set_requires_grad(true);
        let e = flat.differentiable().unwrap().rewards(&pictures, &vec![Prompt::default(); 3]).unwrap_err();
        assert!(e.to_string().contains("is not differentiable"), "{e}");
    }

    #[test]
    fn logits_choose_the_class() {
        let folder = tempfile::tempdir().unwrap();
        let path = module_file(folder.path(), |x| {
            let v = x.select(1, 0).select(1, 0).select(1, 0);
            Tensor::stack(&[&(&v * 0.0 + 0.2), &v, &(&v * 0.0), &(&v * -1.0)], 1)
        });
        let names = ["a", "b", "c", "d"].map(str::to_owned);
        let mut classifier = TorchScriptClassifier::load(&path, &names).unwrap();
        assert_eq!(classifier.classify(&images()).unwrap(), [Some(0), Some(1), Some(1)]);
        assert_eq!(classifier.classify(&(images() * f64::NAN)).unwrap(), [None; 3]);
        let mut three = TorchScriptClassifier::load(&path, &names[..3]).unwrap();
        let e = three.classify(&images()).unwrap_err().to_string();
        assert!(e.contains("gave [3, 4] for 3 pictures, [3, 3] is wanted"), "{e}");
        let e = TorchScriptReward::load(&path).unwrap().score(&images(), &vec![Prompt::default(); 3]).unwrap_err();
        assert!(e.to_string().contains("[3, 1] is wanted"), "{e}");
    }

    #[test]
    fn bad_files_are_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pt");
        std::fs::write(&path, b"not a module").unwrap();
        for (path, wanted) in
            [(path.as_path(), "no TorchScript module"), (&folder.path().join("none.pt"), "cannot read")]
        {
            let e = format!("{:#}", TorchScriptReward::load(path.to_str().unwrap()).err().unwrap());
            assert!(e.contains(wanted) && !e.contains('\n'), "{e}");
        }
    }
}
