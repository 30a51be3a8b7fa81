//! What the tests of single tables of a config share.

use super::load::parse;

/// What is wrong with `slurm/miniature-<name>.toml` under these settings; "none" where nothing is.
pub fn error(name: &str, settings: &[&str]) -> String {
    let path = format!("{}/slurm/miniature-{name}.toml", env!("CARGO_MANIFEST_DIR"));
    let settings: Vec<String> = settings.iter().map(|s| s.to_string()).collect();
    let config = parse(&std::fs::read_to_string(&path).unwrap(), name, &settings);
    match config.and_then(|config| config.validate().map(drop)) {
        Ok(()) => "none".to_string(),
        Err(e) => format!("{e:#}"),
    }
}
