//! The tokenizer against the ids of the real CLIP tokenizer, and `rldiff tokenize`.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rldiff::models::{
    folder::{ModelFiles, ModelLocation},
    tokenizer::Tokenizer,
};
use serde_json::Value;

fn shared() -> Option<PathBuf> {
    let dir = std::env::var_os("RLDIFF_SHARED").map(PathBuf::from);
    if dir.is_none() {
        eprintln!("SKIPPED: RLDIFF_SHARED is not set (folder with data/golden_tokens.json and data/sd_configs)");
    }
    dir
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// 205 prompts with the ids of Stable Diffusion 1.5's and 2's tokenizers, made by OpenAI's vocabulary.
#[test]
fn every_golden_prompt() {
    let Some(shared) = shared() else { return };
    let text = fs::read_to_string(shared.join("data/golden_tokens.json")).unwrap();
    let prompts: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(prompts.len(), 205);
    for (model, key) in [("stable-diffusion-v1-5", "clip77_sd15"), ("stable-diffusion-2-1-base", "clip77_sd2")] {
        let folder = ModelLocation::Disk(shared.join("data/sd_configs").join(model));
        let tokenizer = Tokenizer::from_files(&ModelFiles::read_tokenizer(&folder).unwrap()).unwrap();
        let mut different = Vec::new();
        for prompt in &prompts {
            let text = prompt["text"].as_str().unwrap();
            let ours = tokenizer.encode(text).unwrap().ids;
            if ours != ids(&prompt[key]) {
                different.push(format!("{text:?}\n  ours   {ours:?}\n  golden {:?}", ids(&prompt[key])));
            }
        }
        assert!(different.is_empty(), "{model}: {} of 205 differ:\n{}", different.len(), different.join("\n"));
    }
}

/// `rldiff tokenize --model MODEL` with `input` as standard input: exit code, output, errors.
fn tokenize(model: &Path, input: &[u8]) -> (Option<i32>, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_rldiff"))
        .args(["tokenize", "--model"])
        .arg(model)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // the command may end before it has read everything
    let _ = stdin.write_all(input);
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn rows(text: &str) -> Vec<Vec<u32>> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn one_array_per_line_also_for_the_empty_prompt() {
    let (code, out, err) = tokenize(Path::new("embedded"), "a red circle\n\nlast ✓".as_bytes());
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let rows = rows(&out);
    assert_eq!(rows.len(), 3);
    let (start, end) = (rows[1][0], rows[1][1]);
    for row in &rows {
        assert_eq!((row.len(), row[0]), (rows[0].len(), start));
        assert!(row.contains(&end));
    }
    assert_eq!(tokenize(Path::new("embedded"), b"").1, "");
    assert_eq!(tokenize(Path::new("embedded"), b"a red circle\r\n").1.lines().next(), out.lines().next());
}

#[test]
fn long_prompts_are_cut_with_a_warning() {
    let (code, out, err) = tokenize(Path::new("embedded"), "circle ".repeat(1430).as_bytes());
    assert_eq!(code, Some(0), "{err}");
    let row = &rows(&out)[0];
    // ids between start and end are words; what is over is counted
    assert!(err.lines().count() == 1 && err.contains("line 1") && err.contains("tokens are cut"), "{err}");
    assert_ne!(row[row.len() - 2], row[row.len() - 1]);
}

#[test]
fn bad_input_is_one_line_and_code_2() {
    let (code, out, err) = tokenize(Path::new("embedded"), b"good\nbad \xff\xfe\ngood\n");
    assert_eq!((code, out.lines().count()), (Some(2), 1));
    assert_eq!(err, "error: standard input: line 2 is not UTF-8 (byte 5)\n");

    let folder = tempfile::tempdir().unwrap();
    let (code, _, err) = tokenize(&folder.path().join("nowhere"), b"x\n");
    assert!(code == Some(2) && err.contains("nowhere does not exist") && err.lines().count() == 1, "{err}");
    let (code, _, err) = tokenize(folder.path(), b"x\n");
    assert!(code == Some(2) && err.contains("tokenizer/vocab.json is missing"), "{err}");

    fs::create_dir(folder.path().join("tokenizer")).unwrap();
    let put = |name: &str, text: &str| fs::write(folder.path().join("tokenizer").join(name), text).unwrap();
    put("vocab.json", r#"{"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}"#);
    put("merges.txt", "#version: 0.2\nnonsense\n");
    put("tokenizer_config.json", r#"{"model_max_length": 5}"#);
    let (code, _, err) = tokenize(folder.path(), b"a\n");
    assert!(code == Some(2) && err.contains("merges.txt line 2") && err.lines().count() == 1, "{err}");
    put("merges.txt", "#version: 0.2\na b</w>\n");
    let (code, _, err) = tokenize(folder.path(), b"a\n");
    assert!(code == Some(2) && err.contains("do not fit together") && err.lines().count() == 1, "{err}");

    // only the tokenizer is needed, as a part of a folder or alone
    put("merges.txt", "#version: 0.2\n");
    for model in [folder.path().to_path_buf(), folder.path().join("tokenizer")] {
        assert_eq!(tokenize(&model, b"a aa\n"), (Some(0), "[2, 1, 0, 1, 3]\n".into(), String::new()));
    }
    put("tokenizer_config.json", r#"{"model_max_length": 1}"#);
    let (code, _, err) = tokenize(folder.path(), b"a\n");
    assert!(code == Some(2) && err.contains("model_max_length"), "{err}");
}
