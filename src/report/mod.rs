//! `rldiff report`: one page on a run, or on several side by side. Everything is inside the one file: curves as SVG,
//! pictures as data, style and script.
//!
//! ```text
//! RUN/config.toml, metrics.jsonl, summary.json, samples/, before_after.png ─► RunData ─► sections ─► HTML
//! ```

mod charts;
mod config_difference;
pub(crate) mod html;
mod run_data;
mod sections;
pub(crate) mod svg;

use std::path::PathBuf;

use anyhow::Result;

pub use run_data::RunData;
pub(crate) use sections::Section;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The page on these runs.
///
/// # Errors
/// A folder that holds no run, or one given twice.
pub fn page(folders: &[PathBuf]) -> Result<String> {
    let runs = run_data::read_all(folders)?;
    let title = match runs.as_slice() {
        [run] => run.name.clone(),
        runs => {
            format!("{} runs: {}", runs.len(), runs.iter().map(|run| run.name.as_str()).collect::<Vec<_>>().join(", "))
        }
    };
    Ok(document(&title, &sections::all(&runs)?))
}

/// What every page of [`document`] begins with, up to its title.
const HEAD: &str = "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
                    <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n";
/// What it has and other pages have not.
const MARK: &str = "<div id=\"values\" aria-live=\"polite\" hidden></div>\n<script>\n";

/// Whether `bytes` are a page that `document` made, of any version.
pub fn is_page(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| text.starts_with(HEAD) && text.contains(MARK))
}

/// A page of these sections, style and script inside.
pub(crate) fn document(title: &str, sections: &[Section]) -> String {
    let links: String =
        sections.iter().map(|s| format!("<a href=\"#{}\">{}</a>", s.id, html::escape(s.title))).collect();
    let body: String = sections
        .iter()
        .map(|s| format!("<section id=\"{}\">\n<h2>{}</h2>\n{}</section>\n", s.id, html::escape(s.title), s.body))
        .collect();
    let title = html::escape(title);
    format!(
        "{HEAD}<title>{title}</title>\n\
         <link rel=\"icon\" href=\"data:,\">\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <header><h1>{title}</h1><nav aria-label=\"Sections\">{links}</nav></header>\n<main>\n{body}</main>\n\
         {MARK}{SCRIPT}</script>\n</body>\n</html>\n"
    )
}
