//! What an adapter's configuration says of alpha: PEFT's `adapter_config.json`, or the entry `lora_adapter_metadata` that
//! diffusers writes into the header of a safetensors file (the same keys behind `unet.` and `text_encoder.`).

use anyhow::{bail, ensure, Context, Result};
use serde_json::{Map, Value};

use super::layouts::{Network, READ};

/// PEFT's rules for one network.
#[derive(Debug)]
pub struct PeftConfig {
    alpha: f64,
    /// (end of a layer's path, with underscores; whether it is the whole path; alpha)
    patterns: Vec<(String, bool, f64)>,
    rank_stabilised: bool,
}

impl PeftConfig {
    /// # Errors
    /// A kind of adapter, or an option, that changes what the tensors mean.
    pub fn from_json(json: &Map<String, Value>) -> Result<Self> {
        let kind = json.get("peft_type").and_then(Value::as_str).unwrap_or("LORA");
        ensure!(kind == "LORA", "peft_type = {kind:?}: {READ}");
        let is_set = |key: &str| json.get(key).and_then(Value::as_bool).unwrap_or(false);
        ensure!(!is_set("use_qalora"), "use_qalora = true is not supported");
        let present =
            |key: &str| json.get(key).filter(|value| !value.is_null() && **value != Value::Object(Map::new()));
        for key in ["layer_replication", "alora_invocation_tokens", "arrow_config"] {
            ensure!(present(key).is_none(), "{key} is not supported");
        }
        let start = json.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
        if ["pissa", "olora", "corda", "loftq"].iter().any(|method| start.starts_with(method)) {
            bail!("init_lora_weights = {start:?}: such an adapter belongs to a changed base model, not to the model itself");
        }
        let alpha = json.get("lora_alpha").context("lora_alpha is missing")?;
        let alpha = alpha.as_f64().with_context(|| format!("lora_alpha = {alpha} is no number"))?;
        let mut patterns = Vec::new();
        for (pattern, value) in json.get("alpha_pattern").and_then(Value::as_object).into_iter().flatten() {
            let plain = pattern.replace("\\.", ".");
            let (end, whole) = match plain.strip_prefix('^') {
                Some(path) => (path, true),
                None => (plain.as_str(), false),
            };
            let end = end.trim_end_matches('$');
            ensure!(
                end.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)),
                "alpha_pattern {pattern:?} is a regular expression; only ends of layers' names are supported"
            );
            let value = value.as_f64().with_context(|| format!("alpha_pattern {pattern:?} = {value} is no number"))?;
            let end = end.strip_prefix("text_model.").unwrap_or(end);
            patterns.push((end.replace('.', "_"), whole, value));
        }
        Ok(PeftConfig { alpha, patterns, rank_stabilised: is_set("use_rslora") })
    }

    /// The part of `lora_adapter_metadata` that is for `network`.
    pub fn from_metadata(json: &str, network: Network) -> Result<Option<Self>> {
        let value: Value = serde_json::from_str(json).context("lora_adapter_metadata is not JSON")?;
        let all = value.as_object().context("lora_adapter_metadata is no JSON object")?;
        let prefix = format!("{}.", network.component());
        let own = |(key, value): (&String, &Value)| Some((key.strip_prefix(&prefix)?.to_string(), value.clone()));
        let own: Map<String, Value> = all.iter().filter_map(own).collect();
        if own.is_empty() {
            return Ok(None);
        }
        PeftConfig::from_json(&own).with_context(|| format!("lora_adapter_metadata: {}", network.component())).map(Some)
    }

    /// alpha / rank of a layer, or alpha / √rank.
    pub fn scale(&self, layer: &str, rank: i64) -> f64 {
        let fits = |(end, whole, _): &&(String, bool, f64)| {
            layer == end || !whole && layer.strip_suffix(end.as_str()).is_some_and(|rest| rest.ends_with('_'))
        };
        let alpha = self.patterns.iter().find(fits).map_or(self.alpha, |(_, _, alpha)| *alpha);
        let rank = rank as f64;
        alpha / if self.rank_stabilised { rank.sqrt() } else { rank }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: Value) -> Result<PeftConfig> {
        PeftConfig::from_json(json.as_object().unwrap())
    }

    #[test]
    fn alphas_are_found_as_peft_finds_them() {
        let patterns = serde_json::json!({"attn2.to_k": 3, "^mid_block.resnets.0.conv1": 5.0, "to_q": 2});
        let c = config(serde_json::json!({"lora_alpha": 8, "alpha_pattern": patterns})).unwrap();
        assert_eq!(c.scale("mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 2), 1.5);
        assert_eq!(c.scale("mid_block_attentions_0_transformer_blocks_0_attn1_to_k", 2), 4.0);
        assert_eq!(c.scale("mid_block_attentions_0_transformer_blocks_0_attn1_to_q", 2), 1.0);
        assert_eq!(c.scale("mid_block_resnets_0_conv1", 5), 1.0);
        assert_eq!(c.scale("up_blocks_0_mid_block_resnets_0_conv1", 8), 1.0);
        let c = config(serde_json::json!({"lora_alpha": 8, "use_rslora": true})).unwrap();
        assert_eq!(c.scale("conv_in", 16), 2.0);
    }

    #[test]
    fn what_changes_the_meaning_is_refused() {
        for (json, word) in [
            (serde_json::json!({"peft_type": "LOHA", "lora_alpha": 1}), "LOHA"),
            (serde_json::json!({"lora_alpha": 1, "init_lora_weights": "pissa_niter_4"}), "pissa"),
            (serde_json::json!({"lora_alpha": 1, "alpha_pattern": {"to_(q|k)": 1}}), "regular expression"),
            (serde_json::json!({"r": 4}), "lora_alpha"),
            (serde_json::json!({"lora_alpha": 1, "use_qalora": true}), "use_qalora"),
        ] {
            let error = config(json).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
