//! Tokenizer, networks, schedule and trajectories.

use rldiff::{
    diffusion::{
        sampler::{roll_out, Conditioning},
        schedule::Step,
    },
    models::{
        parameters::{Builder, Source},
        pipeline::Pipeline,
        time_embedding::TimeEmbedding,
    },
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::goldens::{goldens, json};

/// Python has three CLIP tokenizers (plain, with ftfy, compiled); a prompt's ids must be those of one of them.
fn check_token_ids(variant: &str, pipeline: &Pipeline, listing: &Value, prompts: &[String]) {
    for (i, prompt) in prompts.iter().enumerate() {
        let ids = pipeline.tokenizer.encode(prompt).unwrap().ids;
        let key = i.to_string();
        let lists = [&listing["input_ids"][i], &listing["ftfy_input_ids"][&key], &listing["fast_input_ids"][&key]];
        let same = |list: &Value| {
            let list: Vec<u32> = serde_json::from_value(list.clone()).unwrap();
            ids.starts_with(&list) && ids[list.len()..].iter().all(|&id| id == listing["pad_token_id"])
        };
        let mut accepted = lists.into_iter().filter(|list| !list.is_null());
        assert!(accepted.any(same), "{variant}: {prompt:?} became {ids:?}, not {lists:?}");
    }
}

#[test]
fn text_encoder() {
    let Some(mut goldens) = goldens() else { return };
    for variant in goldens.variants() {
        let (pipeline, _) = goldens.pipeline(&variant);
        let text = goldens.file(&variant, "text");
        let listing = json(&goldens.dir.join(format!("goldens/{variant}/tokenizer.json")));
        let prompts: Vec<String> = serde_json::from_value(listing["prompts"].clone()).unwrap();
        check_token_ids(&variant, &pipeline, &listing, &prompts);
        let hidden = tch::no_grad(|| pipeline.text_encoder.forward(text.get("input_ids")));
        goldens.compare(&text, "last_hidden_state", &hidden);
        goldens.all_used(&text);
    }
    goldens.finish();
}

#[test]
fn schedule() {
    let Some(mut goldens) = goldens() else { return };
    for variant in goldens.variants() {
        let (_, schedule) = goldens.pipeline(&variant);
        let file = goldens.file(&variant, "schedule");
        let table = Tensor::from_slice(schedule.alpha_bar());
        let expected = file.get("alphas_cumprod_f32").to_kind(Kind::Double);
        goldens.compare_values(&format!("{variant}/schedule/alphas_cumprod"), &table, &expected);
        goldens.compare_values(
            &format!("{variant}/schedule/one_minus_alphas_cumprod"),
            &(1.0 - &table),
            &(1.0 - &expected),
        );
        for name in file.names("timesteps_") {
            let count: usize = name.trim_start_matches("timesteps_").parse().unwrap();
            let steps = schedule.steps(count, 1.0).unwrap();
            let timesteps: Vec<i64> = steps.iter().map(|step| step.t).collect();
            goldens.compare_within(&file, &name, &Tensor::from_slice(&timesteps), 0.0);
            if !file.tensors.contains_key(&format!("variance_{count}")) {
                continue;
            }
            let column = |of: fn(&Step) -> f64| Tensor::from_slice(&steps.iter().map(of).collect::<Vec<f64>>());
            goldens.compare_within(&file, &format!("alpha_t_{count}"), &column(|s| s.alpha_bar), 0.0);
            goldens.compare_within(&file, &format!("alpha_prev_{count}"), &column(|s| s.alpha_bar_prev), 0.0);
            goldens.compare(&file, &format!("variance_{count}"), &column(|s| s.sigma * s.sigma));
            // the same f64 formula: observed 1e-16
            goldens.compare_within(&file, &format!("std_eta1_{count}"), &column(|s| s.sigma), 1e-15);
        }
        goldens.all_used(&file);
    }
    goldens.finish();
}

#[test]
fn unet() {
    let Some(mut goldens) = goldens() else { return };
    let _no_grad = tch::no_grad_guard();
    for variant in goldens.variants() {
        let (pipeline, _) = goldens.pipeline(&variant);
        let g = goldens.file(&variant, "unet");
        let (sample, text, timesteps) = (g.get("sample"), g.get("encoder_hidden_states"), g.get("timesteps"));
        let rows = sample.size()[0];
        let eps: Vec<Tensor> = (0..timesteps.size()[0])
            .map(|i| pipeline.unet.forward(sample, &timesteps.narrow(0, i, 1).expand([rows], false), text))
            .collect();
        goldens.compare(&g, "eps", &Tensor::stack(&eps, 0));
        let mixed = pipeline.unet.forward(sample, g.get("timesteps_mixed"), text);
        goldens.compare(&g, "eps_mixed", &mixed);

        let config = &pipeline.unet.config;
        let weights = pipeline.unet_parameters.entries.iter().map(|e| (e.name.clone(), e.tensor.shallow_clone()));
        let builder = Builder::new(Source::Tensors(weights.collect()), Kind::Float, Device::Cpu).sub("time_embedding");
        let embedding =
            TimeEmbedding::new(&builder, config.levels[0].channels, config.flip_sin_to_cos, config.freq_shift).unwrap();
        let t = g.get("time_proj.timesteps");
        goldens.compare(&g, "time_proj", &embedding.sinusoids(t));
        goldens.compare(&g, "time_embedding", &embedding.forward(t, Kind::Float));
        goldens.all_used(&g);
    }
    goldens.finish();
}

/// Pictures in [−1, 1] as NHWC bytes.
fn to_bytes(raw: &Tensor) -> Tensor {
    ((raw / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round().permute([0, 2, 3, 1]).to_kind(Kind::Uint8)
}

#[test]
fn vae() {
    let Some(mut goldens) = goldens() else { return };
    let _no_grad = tch::no_grad_guard();
    for variant in goldens.variants() {
        let (pipeline, _) = goldens.pipeline(&variant);
        let g = goldens.file(&variant, "vae");
        let scale = pipeline.vae.config.scaling_factor;
        let decoded = pipeline.vae.decode(&(g.get("latents") / scale));
        goldens.compare(&g, "decoded", &decoded);
        goldens.compare_bytes(&g, "decoded_u8", &to_bytes(&decoded));
        let posterior = pipeline.vae.encode(g.get("images"));
        goldens.compare(&g, "mean", &posterior.mean);
        goldens.compare(&g, "logvar", &posterior.log_variance);
        goldens.compare(&g, "sampled_scaled", &(posterior.sample(g.get("noise")) * scale));
        goldens.all_used(&g);
    }
    goldens.finish();
}

#[test]
fn trajectories() {
    let Some(mut goldens) = goldens() else { return };
    let _no_grad = tch::no_grad_guard();
    for variant in goldens.variants() {
        let (pipeline, schedule) = goldens.pipeline(&variant);
        for name in ["ddim10", "ddim50"] {
            let g = goldens.file(&variant, name);
            let (x_t, noise) = (g.get("x_T"), g.get("noise"));
            let conditioning = Conditioning::new(g.get("cond"), g.get("uncond"), goldens.guidance_scale);
            for (eta, key) in [(0.0, "eta0"), (1.0, "eta1")] {
                let steps = schedule.steps(noise.size()[0] as usize, eta).unwrap();
                let noise_of = |i: usize| noise.get(i as i64);
                let trajectory =
                    roll_out(&pipeline.unet, None, &steps, x_t.shallow_clone(), &conditioning, noise_of).unwrap();
                goldens.compare(&g, &format!("{key}.latents"), &Tensor::stack(&trajectory.latents, 0));
                let expected = g.get(&format!("{key}.latents"));
                let last = expected.get(expected.size()[0] - 1);
                goldens.compare_values(&format!("{variant}/{name}/{key}.x0_only"), trajectory.x_0(), &last);
                let picture = pipeline.vae.decode(&(trajectory.x_0() / pipeline.vae.config.scaling_factor));
                goldens.compare_bytes(&g, &format!("{key}.image_u8"), &to_bytes(&picture));
                let raw = format!("{key}.image_raw");
                if g.tensors.contains_key(&raw) {
                    goldens.compare(&g, &raw, &picture);
                }
                if eta > 0.0 {
                    let log_probs: Vec<&Tensor> = trajectory.log_probs.iter().map(|p| p.as_ref().unwrap()).collect();
                    let mean = Tensor::stack(&log_probs, 0);
                    goldens.compare(&g, &format!("{key}.logp_mean"), &mean);
                    let elements = x_t.get(0).numel() as f64;
                    let sum = mean.to_kind(Kind::Double) * elements;
                    goldens.compare(&g, &format!("{key}.logp_sum"), &sum);
                }
            }
            goldens.all_used(&g);
        }
    }
    goldens.finish();
}
