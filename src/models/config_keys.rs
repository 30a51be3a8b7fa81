//! The keys of the networks' configs: which values are built here, and which keys nobody reads.

use anyhow::{bail, ensure, Result};
use serde_json::Value;

use crate::python_json::shown;

/// Notes that the libraries leave in their configs, and those of averaged weights (diffusers' `EMAModel`).
const NOTES: &[&str] = &[
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "_commit_hash",
    "_use_default_values",
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
];

/// Fails unless a size from a config is positive and small enough that products of a few do not overflow.
pub fn ensure_size(key: &str, size: i64) -> Result<()> {
    ensure!((1..=1 << 20).contains(&size), "{key} = {size} is out of range");
    Ok(())
}

/// Fails where a key of `json` differs from what this code builds; absent and null are fine.
pub fn ensure_supported(json: &Value, fixed: &[(&str, &[&str])]) -> Result<()> {
    for (key, accepted) in fixed {
        let value = json.get(*key).unwrap_or(&Value::Null);
        if !value.is_null() && !accepted.contains(&value.to_string().as_str()) {
            let list = if accepted.is_empty() { "null".to_string() } else { accepted.join(" or ") };
            bail!("{key} = {} is not supported (only {list})", shown(value));
        }
    }
    Ok(())
}

/// Fails unless `key` is absent, null, `accepted`, or a list of that.
pub fn ensure_list(json: &Value, key: &str, accepted: &Value) -> Result<()> {
    let value = json.get(key).unwrap_or(&Value::Null);
    let listed = value.as_array().is_some_and(|list| list.iter().all(|one| one == accepted));
    ensure!(
        value.is_null() || value == accepted || listed,
        "{key} = {} is not supported (only {accepted})",
        shown(value)
    );
    Ok(())
}

/// Fails unless `_class_name` is `expected` (or absent).
pub fn ensure_class(json: &Value, expected: &str) -> Result<()> {
    match json.get("_class_name").and_then(Value::as_str) {
        Some(class) if class != expected => bail!("_class_name is {class}, expected {expected}"),
        _ => Ok(()),
    }
}

/// Keys that are in none of the lists.
pub fn unknown(json: &Value, lists: &[&[&str]], fixed: &[(&str, &[&str])]) -> Vec<String> {
    let known = |key: &str| {
        NOTES.contains(&key) || lists.iter().any(|list| list.contains(&key)) || fixed.iter().any(|(k, _)| *k == key)
    };
    let keys = json.as_object().into_iter().flatten();
    keys.filter(|(key, value)| !known(key) && !value.is_null()).map(|(key, _)| key.clone()).collect()
}
