//! Pretraining of the miniature from scratch: the VAE on pictures, then text encoder and U-Net on L_pre.
//!
//! The result is a diffusers folder; the one embedded in the binary was made by `rldiff pretrain` with its defaults.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::{
    blueprint,
    edition::Edition,
    raster::{SIZE, VALUES},
    scene,
};
use crate::{
    comm::Communicator,
    diffusion::schedule::Schedule,
    kernels::adamw::AdamW,
    models::{flat_parameters::FlatParameters, pipeline::Pipeline},
    policy::{
        gradient_sum::{GradientSum, Transport},
        lanes::Lanes,
        optimizer::{update_average, Optimizer},
        pretraining::{self, Corruption},
    },
    random::{Coordinates, Purpose, Stream},
};

/// Sizes of a pretraining run; the defaults made the embedded weights.
#[derive(Clone, Copy, Debug)]
pub struct PretrainSettings {
    pub edition: Edition,
    pub seed: u64,
    pub vae_steps: u64,
    pub unet_steps: u64,
    /// Pictures per optimizer step, over all ranks.
    pub vae_batch: usize,
    pub unet_batch: usize,
}

impl Default for PretrainSettings {
    fn default() -> Self {
        PretrainSettings {
            edition: Edition::Second,
            seed: 5,
            vae_steps: 3000,
            unet_steps: 7000,
            vae_batch: 16,
            unet_batch: 64,
        }
    }
}

/// Pieces each batch is cut into: 1 or 2 ranks give the same weights.
const LANES: usize = 2;
/// Pictures that the U-Net's training draws from.
const POOL: usize = 24_000;
/// Share of captions replaced by the empty prompt, for classifier-free guidance.
const CAPTION_DROPOUT: f64 = 0.1;
const EMA_DECAY: f64 = 0.998;
const KL_WEIGHT: f64 = 3e-4;
const L1_WEIGHT: f64 = 0.5;

/// # Errors
/// A number of ranks that cannot share the batches.
pub fn check_ranks(comm: &dyn Communicator) -> Result<()> {
    Lanes::new(LANES, comm).map(drop)
}

/// Trains all three networks; calls `report` with a line now and then.
pub fn run(settings: PretrainSettings, comm: &dyn Communicator, report: &mut dyn FnMut(String)) -> Result<Pipeline> {
    let mut pipeline = Pipeline::seeded(blueprint::files(settings.edition), settings.seed, Device::Cpu)?;
    train_vae(&pipeline, settings, comm, report)?;
    set_scaling_factor(&mut pipeline, settings.edition, settings.seed)?;
    train_denoiser(&pipeline, settings, comm, report)?;
    Ok(pipeline)
}

/// Cosine from 1 to 0 with `warmup` linear steps in front.
fn learning_rate_factor(step: u64, steps: u64, warmup: u64) -> f64 {
    let rise = ((step + 1) as f64 / warmup as f64).min(1.0);
    rise * (0.5 + 0.5 * (std::f64::consts::PI * step as f64 / steps as f64).cos()) + 0.01
}

/// Pictures in [−1, 1], f32 [n, 3, 32, 32].
pub fn pictures(edition: Edition, seed: u64, indices: &[u64]) -> Tensor {
    let mut values = Vec::with_capacity(indices.len() * VALUES);
    for &index in indices {
        values.extend(scene::draw(edition, seed, index).pixels.iter().map(|&v| v * 2.0 - 1.0));
    }
    Tensor::from_slice(&values).view([indices.len() as i64, 3, SIZE as i64, SIZE as i64])
}

fn batch_stream(seed: u64, purpose: Purpose, step: u64, lane: usize) -> Stream {
    Coordinates { iteration: step as u32, sample: lane as u32, ..Coordinates::new(seed, purpose) }.stream()
}

fn train_vae(
    pipeline: &Pipeline,
    settings: PretrainSettings,
    comm: &dyn Communicator,
    report: &mut dyn FnMut(String),
) -> Result<()> {
    let mut params = FlatParameters::new(&[&pipeline.vae_parameters])?;
    let adamw = AdamW { learning_rate: 2.5e-3, weight_decay: 1e-4, ..AdamW::default() };
    let mut optimizer = Optimizer::new(params.buffer(), adamw, Some(1.0), 0);
    let lanes = Lanes::new(LANES, comm)?;
    let mut sum = GradientSum::new(&params, Transport::default())?;
    let per_lane = settings.vae_batch / LANES;
    let [channels, height, width] = pipeline.latent_shape();

    for step in 0..settings.vae_steps {
        let mut squared_error = 0.0;
        let gradient = lanes.sum_gradients(&mut sum, comm, |lane| {
            let first = step * settings.vae_batch as u64 + (lane * per_lane) as u64;
            let x = pictures(settings.edition, settings.seed, &(first..first + per_lane as u64).collect::<Vec<_>>());
            let mut noise = vec![0f32; per_lane * (channels * height * width) as usize];
            batch_stream(settings.seed, Purpose::Posterior, step, lane).fill_normal(&mut noise);
            let noise = Tensor::from_slice(&noise).view([per_lane as i64, channels, height, width]);
            let posterior = pipeline.vae.encode(&x);
            let difference = pipeline.vae.decode(&posterior.sample(&noise)) - &x;
            let mse = difference.square().mean(Kind::Float);
            squared_error += mse.double_value(&[]);
            Ok((mse + difference.abs().mean(Kind::Float) * L1_WEIGHT + posterior.kl() * KL_WEIGHT) / LANES as f64)
        })?;
        optimizer.settings.learning_rate = 2.5e-3 * learning_rate_factor(step, settings.vae_steps, 50);
        optimizer.step(&mut params, &gradient)?;
        sum.recycle(gradient);
        if (step + 1) % 100 == 0 {
            // peak-to-peak of [−1, 1] is 2
            let psnr = 10.0 * (4.0 * lanes.mine().len() as f64 / squared_error).log10();
            report(format!("VAE step {}/{}  PSNR {psnr:.1} dB", step + 1, settings.vae_steps));
        }
    }
    pipeline.vae_parameters.freeze();
    Ok(())
}

/// Sets `scaling_factor` to 1/std of the latents, so that the U-Net sees unit variance.
fn set_scaling_factor(pipeline: &mut Pipeline, edition: Edition, seed: u64) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let means: Vec<Tensor> = (0..8u64)
        .map(|k| pipeline.vae.encode(&pictures(edition, seed, &(k * 250..(k + 1) * 250).collect::<Vec<_>>())).mean)
        .collect();
    let std = Tensor::cat(&means, 0).std(false).double_value(&[]);
    // few digits, so that the JSON file says exactly what was used
    let factor = (1e4 / std).round() / 1e4;
    pipeline.vae.config.scaling_factor = factor;
    let mut config: serde_json::Value = serde_json::from_slice(pipeline.text_file("vae/config.json")?)?;
    config["scaling_factor"] = factor.into();
    pipeline.set_text_file("vae/config.json", serde_json::to_vec_pretty(&config)?);
    Ok(())
}

/// Latents (posterior mean and deviation, scaled) and token ids of the pool.
struct Pool {
    mean: Tensor,
    deviation: Tensor,
    ids: Tensor,
}

impl Pool {
    fn encode(pipeline: &Pipeline, edition: Edition, seed: u64) -> Result<Pool> {
        let _no_grad = tch::no_grad_guard();
        let scale = pipeline.vae.config.scaling_factor;
        let (mut means, mut deviations, mut captions) = (Vec::new(), Vec::new(), Vec::new());
        for start in (0..POOL as u64).step_by(250) {
            let indices: Vec<u64> = (start..start + 250).collect();
            let posterior = pipeline.vae.encode(&pictures(edition, seed, &indices));
            means.push(posterior.mean * scale);
            deviations.push((posterior.log_variance * 0.5).exp() * scale);
            captions.extend(indices.iter().map(|&i| scene::draw(edition, seed, i).caption));
        }
        Ok(Pool {
            mean: Tensor::cat(&means, 0),
            deviation: Tensor::cat(&deviations, 0),
            ids: pipeline.tokenizer.encode_batch(&captions)?,
        })
    }
}

fn train_denoiser(
    pipeline: &Pipeline,
    settings: PretrainSettings,
    comm: &dyn Communicator,
    report: &mut dyn FnMut(String),
) -> Result<()> {
    let pool = Pool::encode(pipeline, settings.edition, settings.seed)?;
    let empty = pipeline.tokenizer.encode_batch(&[""])?;
    let schedule = Schedule::of_model(&pipeline.scheduler)?;
    let mut params = FlatParameters::new(&[&pipeline.unet_parameters, &pipeline.text_parameters])?;
    let adamw = AdamW { weight_decay: 1e-3, ..AdamW::default() };
    let mut optimizer = Optimizer::new(params.buffer(), adamw, Some(1.0), 0);
    let mut average = params.buffer().clone();
    let lanes = Lanes::new(LANES, comm)?;
    let mut sum = GradientSum::new(&params, Transport::default())?;
    let per_lane = settings.unet_batch / LANES;
    let shape = pipeline.latent_shape();

    let mut smooth = f64::NAN;
    for step in 0..settings.unet_steps {
        let mut losses = 0.0;
        let gradient = lanes.sum_gradients(&mut sum, comm, |lane| {
            let mut stream = batch_stream(settings.seed, Purpose::PretrainPair, step, lane);
            let picked: Vec<i64> = (0..per_lane).map(|_| stream.below(POOL as u64) as i64).collect();
            let dropped: Vec<bool> = (0..per_lane).map(|_| stream.uniform() < CAPTION_DROPOUT).collect();
            let mut noise = vec![0f32; per_lane * shape.iter().product::<i64>() as usize];
            batch_stream(settings.seed, Purpose::Posterior, step, LANES + lane).fill_normal(&mut noise);
            let picked = Tensor::from_slice(&picked);
            let z_0 = pool.mean.index_select(0, &picked)
                + pool.deviation.index_select(0, &picked)
                    * Tensor::from_slice(&noise).view([per_lane as i64, shape[0], shape[1], shape[2]]);
            let dropped = Tensor::from_slice(&dropped).unsqueeze(1);
            let ids = empty.where_self(&dropped, &pool.ids.index_select(0, &picked));
            let text = pipeline.text_encoder.forward(&ids);
            let at = Coordinates {
                iteration: step as u32,
                sample: (lane * per_lane) as u32,
                ..Coordinates::new(settings.seed, Purpose::PretrainNoise)
            };
            let at = Corruption::draw(at, per_lane, &shape, schedule.alpha_bar().len());
            let loss = pretraining::loss(&pipeline.unet, &schedule, &z_0, &text, &at) / LANES as f64;
            losses += loss.double_value(&[]);
            Ok(loss)
        })?;
        optimizer.settings.learning_rate = 1.2e-3 * learning_rate_factor(step, settings.unet_steps, 100);
        optimizer.step(&mut params, &gradient)?;
        sum.recycle(gradient);
        // a young average would remember the initial weights
        let decay = EMA_DECAY.min((step + 1) as f64 / (step + 21) as f64);
        update_average(&mut average, params.buffer(), decay);

        let mean_loss = losses * LANES as f64 / lanes.mine().len() as f64;
        smooth = if smooth.is_nan() { mean_loss } else { 0.98 * smooth + 0.02 * mean_loss };
        if (step + 1) % 100 == 0 {
            report(format!("U-Net step {}/{}  L_pre {smooth:.4}", step + 1, settings.unet_steps));
        }
    }
    params.buffer_mut().copy_from_slice(average.slice());
    params.publish();
    pipeline.unet_parameters.freeze();
    pipeline.text_parameters.freeze();
    Ok(())
}
