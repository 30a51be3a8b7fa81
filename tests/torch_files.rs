//! Files of torch.save: written here byte by byte, written by PyTorch where RLDIFF_TEST_PYTHON names a Python that has
//! it, and damaged in thousands of ways.

use std::{
    collections::BTreeMap,
    fs,
    panic::{catch_unwind, AssertUnwindSafe},
    path::Path,
    process::Command,
};

use rldiff::models::weight_files::read_tensors;
use tch::{Kind, Tensor};

type Tensors = BTreeMap<String, Tensor>;

/// A storage of f32 and the views of it: (name, offset, size, stride).
struct Storage {
    values: Vec<f32>,
    views: Vec<(&'static str, u8, Vec<u8>, Vec<u8>)>,
}

fn storages() -> Vec<Storage> {
    let values = (0..12).map(|i| i as f32 * 0.5).collect();
    let views = vec![
        ("whole", 0, vec![3, 4], vec![4, 1]),
        ("transposed", 0, vec![4, 3], vec![1, 4]),
        ("column", 2, vec![3], vec![4]),
        ("expanded", 5, vec![2, 2], vec![0, 1]),
        ("scalar", 11, vec![], vec![]),
        ("empty", 12, vec![0, 4], vec![4, 1]),
    ];
    let other = Storage { values: vec![-1.0, f32::MAX], views: vec![("other", 0, vec![2], vec![1])] };
    vec![Storage { values, views }, other]
}

fn expected() -> Tensors {
    let whole = Tensor::arange(12, (Kind::Float, tch::Device::Cpu)).view([3, 4]) * 0.5;
    let flat = whole.view([-1]);
    BTreeMap::from([
        ("transposed".to_string(), whole.tr()),
        ("column".to_string(), whole.select(1, 2)),
        ("expanded".to_string(), flat.narrow(0, 5, 2).expand([2, 2], false)),
        ("scalar".to_string(), flat.get(11)),
        ("empty".to_string(), flat.narrow(0, 0, 0).view([0, 4])),
        ("other".to_string(), Tensor::from_slice(&[-1.0, f32::MAX])),
        ("whole".to_string(), whole),
    ])
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn counts(out: &mut Vec<u8>, counts: &[u8]) {
    out.push(b'(');
    counts.iter().for_each(|&n| out.extend([b'K', n]));
    out.push(b't');
}

/// The dict of all views, inside {"epoch": 3, "note": None, "state_dict": …}.
fn object(legacy: bool) -> Vec<u8> {
    let mut out = b"\x80\x02}(".to_vec();
    text(&mut out, "epoch");
    out.extend(b"K\x03");
    text(&mut out, "note");
    out.push(b'N');
    text(&mut out, "state_dict");
    out.extend(b"ccollections\nOrderedDict\n)R(");
    for (key, storage) in storages().iter().enumerate() {
        for (name, offset, size, stride) in &storage.views {
            text(&mut out, name);
            out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
            text(&mut out, "storage");
            out.extend(b"ctorch\nFloatStorage\n");
            text(&mut out, &key.to_string());
            text(&mut out, "cuda:0");
            out.extend([b'K', storage.values.len() as u8]);
            out.extend(if legacy { &b"NtQ"[..] } else { &b"tQ"[..] });
            out.extend([b'K', *offset]);
            counts(&mut out, size);
            counts(&mut out, stride);
            out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        }
        text(&mut out, &format!("list beside tensors {key}"));
        out.extend(b"](K\x01G\0\0\0\0\0\0\0\0e");
    }
    out.extend(b"u}");
    text(&mut out, "_metadata");
    out.extend(b"}sbu.");
    out
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn entries(pickle: Vec<u8>) -> Vec<(String, Vec<u8>)> {
    let mut all = vec![("any name/data.pkl".to_string(), pickle), ("any name/byteorder".into(), b"little".to_vec())];
    for (key, storage) in storages().iter().enumerate() {
        all.push((format!("any name/data/{key}"), bytes_of(&storage.values)));
    }
    all.push(("any name/version".into(), b"3\n".to_vec()));
    all
}

/// A ZIP archive; with `wide` sizes, offsets and counts stand in the ZIP64 fields.
fn zip(entries: &[(String, Vec<u8>)], wide: bool, method: u16) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let (at, size, crc) = (out.len() as u64, data.len() as u64, crc32fast::hash(data));
        let narrow = |n: u64| if wide { u32::MAX } else { n as u32 };
        let mut extra = Vec::new();
        if wide {
            // a foreign field in front of the one that counts
            extra.extend([9, 0, 2, 0, 7, 7, 1, 0, 24, 0]);
            [size, size, at].iter().for_each(|n| extra.extend(n.to_le_bytes()));
        }
        let mut common = method.to_le_bytes().to_vec();
        common.extend([0; 4]);
        common.extend(crc.to_le_bytes());
        common.extend([narrow(size).to_le_bytes(), narrow(size).to_le_bytes()].concat());
        common.extend((name.len() as u16).to_le_bytes());

        out.extend(b"PK\x03\x04\x14\0\0\0");
        out.extend(&common);
        // torch pads with an extra field, which the directory does not have
        out.extend(5u16.to_le_bytes());
        out.extend(name.as_bytes());
        out.extend(b"FB\x01\0Z");
        out.extend(data);

        directory.extend(b"PK\x01\x02\0\0\x14\0\0\0");
        directory.extend(&common);
        directory.extend((extra.len() as u16).to_le_bytes());
        directory.extend([0; 10]);
        directory.extend(narrow(at).to_le_bytes());
        directory.extend(name.as_bytes());
        directory.extend(&extra);
    }
    let (count, start) = (entries.len() as u64, out.len() as u64);
    let size = directory.len() as u64;
    out.extend(directory);
    if wide {
        let end = out.len() as u64;
        out.extend(b"PK\x06\x06");
        out.extend(44u64.to_le_bytes());
        out.extend([0; 12]);
        [count, count, size, start].iter().for_each(|n| out.extend(n.to_le_bytes()));
        out.extend(b"PK\x06\x07\0\0\0\0");
        out.extend(end.to_le_bytes());
        out.extend(1u32.to_le_bytes());
    }
    out.extend(b"PK\x05\x06\0\0\0\0");
    let (count, start) = if wide { (u16::MAX, u32::MAX) } else { (count as u16, start as u32) };
    out.extend([count.to_le_bytes(), count.to_le_bytes()].concat());
    out.extend((size as u32).to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend([0; 2]);
    out
}

fn legacy() -> Vec<u8> {
    let mut out = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}".to_vec();
    text(&mut out, "little_endian");
    out.extend(b"\x88s.");
    out.extend(object(true));
    out.extend(b"\x80\x02](");
    text(&mut out, "1");
    text(&mut out, "0");
    out.extend(b"e.");
    for storage in storages().iter().rev() {
        out.extend((storage.values.len() as i64).to_le_bytes());
        out.extend(bytes_of(&storage.values));
    }
    out
}

fn same(a: &Tensors, b: &Tensors) -> bool {
    a.keys().eq(b.keys()) && a.iter().all(|(name, t)| t.kind() == b[name].kind() && t.equal(&b[name]))
}

fn refusal(bytes: &[u8], name: &str) -> String {
    let error = format!("{:#}", read_tensors(bytes, name).expect_err("a refusal"));
    assert!(error.starts_with(name) && error.lines().count() == 1, "{error}");
    error
}

#[test]
fn every_form_gives_the_same_tensors() {
    for (form, bytes) in [
        ("zip", zip(&entries(object(false)), false, 0)),
        ("zip64", zip(&entries(object(false)), true, 0)),
        ("legacy", legacy()),
    ] {
        for name in ["model.bin", "model.safetensors"] {
            let tensors = read_tensors(&bytes, name).unwrap_or_else(|e| panic!("{form}: {e:#}"));
            assert!(same(&tensors, &expected()), "{form}");
            assert!(tensors.values().all(|t| t.is_contiguous()));
        }
    }
}

#[test]
fn foreign_objects_compression_and_damage_are_refused_with_the_reason() {
    let evil = b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R.".to_vec();
    for name in ["model.bin", "model.safetensors"] {
        assert!(refusal(&evil, name).contains("posix.system"), "bare");
        assert!(refusal(&zip(&entries(evil.clone()), false, 0), name).contains("posix.system"), "zip");
        let mut late = legacy();
        let at = late.windows(5).position(|w| w == b"epoch").unwrap();
        late.splice(at - 5..at - 5, evil[2..15].iter().copied());
        assert!(refusal(&late, name).contains("posix.system"), "legacy");
        let mut nested = object(false);
        nested.splice(3..3, b"cbuiltins\neval\n".iter().copied());
        assert!(refusal(&zip(&entries(nested), false, 0), name).contains("builtins.eval"), "deep inside");
    }
    let protocol_4 = b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.";
    assert!(refusal(protocol_4, "model.pt").contains("posix.system"));
    assert!(refusal(b"cos\nsystem\n(S'true'\ntR.", "model.pt").contains("os.system"));
    assert!(refusal(&zip(&entries(object(false)), false, 8), "model.bin").contains("compressed"));
    assert!(refusal(&zip(&entries(object(false))[1..], false, 0), "model.bin").contains("data.pkl"));
    let mut without = entries(object(false));
    without.remove(2);
    assert!(refusal(&zip(&without, false, 0), "model.bin").contains("any name/data/0 is missing"));
    let mut big = entries(object(false));
    big[1].1 = b"big".to_vec();
    assert!(refusal(&zip(&big, false, 0), "model.bin").contains("big"));
    let mut short = entries(object(false));
    short[2].1.pop();
    assert!(refusal(&zip(&short, false, 0), "model.bin").contains("47 bytes"));
    let mut flipped = zip(&entries(object(false)), false, 0);
    let at = flipped.windows(4).position(|w| w == 5.5f32.to_le_bytes()).unwrap();
    flipped[at] ^= 1;
    assert!(refusal(&flipped, "model.bin").contains("any name/data/0: damaged: its CRC-32"));
    for junk in [&b""[..], b"junk", b"<!DOCTYPE html>", b"PK\x03\x04", &[0x80, 2], &[0; 64]] {
        refusal(junk, "model.bin");
        refusal(junk, "model.safetensors");
    }
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    assert!(refusal(pointer, "model.bin").contains("Git LFS pointer"));
}

/// A view that leaves its storage, or repeats it beyond measure, is an error and not a read of foreign memory.
#[test]
fn views_stay_inside_their_storage() {
    let whole = object(false);
    let at = whole.windows(6).position(|w| w == b"(K\x03K\x04t").unwrap();
    for (size, stride) in [(&[4, 4][..], &[4, 1][..]), (&[3, 4], &[5, 1]), (&[3, 4], &[4, 2]), (&[3], &[4, 1])] {
        let mut bad = Vec::new();
        counts(&mut bad, size);
        counts(&mut bad, stride);
        let mut pickle = whole.clone();
        pickle.splice(at..at + 12, bad);
        let error = refusal(&zip(&entries(pickle), false, 0), "model.bin");
        assert!(error.contains("tensor whole") || error.contains("2 strides"), "{error}");
    }
    let mut huge = whole.clone();
    huge.splice(at..at + 12, b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ftK\0K\0\x86".iter().copied());
    assert!(refusal(&zip(&entries(huge), false, 0), "model.bin").contains("too often"));
    let mut negative = whole;
    negative.splice(at..at + 12, b"(J\xff\xff\xff\xffK\x01tK\x01K\x01\x86".iter().copied());
    assert!(refusal(&zip(&entries(negative), false, 0), "model.bin").contains("negative"));
}

/// Splitmix64, for damage that is the same every time.
fn next(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 33) as usize
}

/// Flips and truncations: never a panic; an error is one line; where the format has checksums, success means the same
/// tensors. safetensors and the old form have none, so there changed values pass unnoticed.
#[test]
fn damage_is_never_a_panic() {
    let safetensors = rldiff::models::weights::write_safetensors(&expected(), Kind::Float).unwrap();
    let kinds = [
        ("model.bin", zip(&entries(object(false)), false, 0), true),
        ("wide.bin", zip(&entries(object(false)), true, 0), true),
        ("old.bin", legacy(), false),
        ("model.safetensors", safetensors, false),
    ];
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut wrong = Vec::new();
    let mut refused = 0;
    for (name, bytes, checked) in &kinds {
        let mut state = 7;
        for round in 0..4000 {
            let mut damaged = bytes.clone();
            match round % 4 {
                0 => damaged.truncate(next(&mut state) % bytes.len()),
                1 => damaged[next(&mut state) % bytes.len()] = next(&mut state) as u8,
                2 => damaged[next(&mut state) % bytes.len()] ^= 1 << (next(&mut state) % 8),
                _ => (0..8).for_each(|_| damaged[next(&mut state) % bytes.len()] ^= 1 << (next(&mut state) % 8)),
            }
            match catch_unwind(AssertUnwindSafe(|| read_tensors(&damaged, name))) {
                Err(_) => wrong.push(format!("{name} round {round}: panic")),
                Ok(Ok(tensors)) if *checked && !same(&tensors, &expected()) => {
                    wrong.push(format!("{name} round {round}: other tensors"));
                }
                Ok(Ok(_)) => {}
                Ok(Err(e)) => {
                    refused += 1;
                    let text = format!("{e:#}");
                    if text.lines().count() != 1 || !text.starts_with(name) {
                        wrong.push(format!("{name} round {round}: {text}"));
                    }
                }
            }
        }
    }
    std::panic::set_hook(hook);
    assert!(wrong.is_empty(), "{} of 16000:\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
    println!("{refused} of 16000 damaged files refused");
    assert!(refused > 8000, "{refused}");
}

/// The old file of a released face detector, where it is at hand.
#[test]
fn a_released_file_of_the_old_form() {
    let Some(shared) = std::env::var_os("RLDIFF_SHARED") else {
        eprintln!("SKIPPED: RLDIFF_SHARED is not set (folder with data/faces/version-RFB-320.pth)");
        return;
    };
    let bytes = fs::read(Path::new(&shared).join("data/faces/version-RFB-320.pth")).unwrap();
    let tensors = read_tensors(&bytes, "version-RFB-320.pth").unwrap();
    assert_eq!(tensors["base_net.0.0.weight"].size(), [16, 3, 3, 3]);
    assert!(tensors.len() > 200 && tensors.values().all(|t| t.isfinite().all().int64_value(&[]) == 1));
}

const SAVE: &str = r#"
import collections, json, sys, torch
out = sys.argv[1]
g = torch.Generator().manual_seed(1)
base = torch.randn(6, 5, generator=g)
state = collections.OrderedDict()
state["float"] = base
state["rows"] = base[2:4]
state["transposed"] = base.t()
state["strided"] = base[1::2, ::3]
state["expanded"] = base[0].expand(3, 5)
state["parameter"] = torch.nn.Parameter(torch.randn(3, generator=g))
state["frozen"] = torch.nn.Parameter(torch.randn(3, generator=g), requires_grad=False)
state["half"] = torch.randn(4, generator=g).half()
state["bfloat16"] = torch.randn(4, generator=g).bfloat16()
state["double"] = torch.randn(2, generator=g, dtype=torch.float64)
state["long"] = torch.tensor([-5, 2**40])
state["int"] = torch.tensor([-5, 7], dtype=torch.int32)
state["byte"] = torch.tensor([0, 255], dtype=torch.uint8)
state["bool"] = torch.tensor([True, False])
state["scalar"] = torch.tensor(2.5)
state["empty"] = torch.zeros(0, 3)
state._metadata = {"": {"version": 1}}
module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
top = {"epoch": 3, "lr": 1e-4, "name": "x", "none": None, "list": [1, (2, "a")], "big": 2**80, "yes": True}
files = {"plain": state, "wrapped": {**top, "state_dict": state}, "model": {**top, "model": state}, "module": module}
for name, value in files.items():
    torch.save(value, f"{out}/{name}.zip.bin")
    torch.save(value, f"{out}/{name}.old.bin", _use_new_zipfile_serialization=False)
torch.serialization.set_crc32_options(False)
torch.save(state, f"{out}/plain.nocrc.bin")
listing = lambda s: {k: [list(v.shape), v.detach().double().flatten().tolist()] for k, v in s.items()}
json.dump({"state": listing(state), "module": listing(module)}, open(f"{out}/expected.json", "w"))
"#;

#[test]
fn files_that_torch_wrote() {
    let Some(python) = std::env::var_os("RLDIFF_TEST_PYTHON") else {
        eprintln!("SKIPPED: RLDIFF_TEST_PYTHON is not set (a Python with PyTorch)");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(python).args(["-c", SAVE]).arg(dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    type Listing = BTreeMap<String, BTreeMap<String, (Vec<i64>, Vec<f64>)>>;
    let expected: Listing = serde_json::from_slice(&fs::read(dir.path().join("expected.json")).unwrap()).unwrap();
    let mut files = 0;
    for entry in fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        if !name.ends_with(".bin") {
            continue;
        }
        let tensors = read_tensors(&fs::read(&path).unwrap(), &name).unwrap_or_else(|e| panic!("{e:#}"));
        let listing = &expected[if name.starts_with("module") { "module" } else { "state" }];
        assert!(tensors.keys().eq(listing.keys()), "{name}: {:?}", tensors.keys());
        for (key, (size, values)) in listing {
            let ours: Vec<f64> = Vec::try_from(tensors[key].to_kind(Kind::Double).reshape([-1])).unwrap();
            assert!(tensors[key].size() == *size && ours == *values, "{name}: {key}");
        }
        files += 1;
    }
    assert_eq!(files, 9);
}
