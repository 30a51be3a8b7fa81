//! Compiles what tch lacks of libtorch's C++ (csrc/), tells the linker where libtorch lies, so that the binary runs without
//! any environment set, and names the version with the commit that it is of.
use std::{
    env, fs,
    path::{Path, PathBuf},
};

#[path = "src/revision.rs"]
mod revision;

const SOURCES: &[&str] = &[
    "csrc/allocations.cpp",
    "csrc/bench.cpp",
    "csrc/cuda.cpp",
    "csrc/geglu.cpp",
    "csrc/gradient_hooks.cpp",
    "csrc/group_norm_silu.cpp",
    "csrc/layer_norm.cpp",
    "csrc/numerics.cpp",
    "csrc/recompute.cpp",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=csrc/operation.h");
    for source in SOURCES {
        println!("cargo:rerun-if-changed={source}");
    }
    println!("cargo:rerun-if-env-changed=RLDIFF_RPATH");

    let mut version = env!("CARGO_PKG_VERSION").to_string();
    if let Some(revision) = revision::of_checkout(Path::new(env!("CARGO_MANIFEST_DIR"))) {
        version += &format!(" ({})", revision.hash);
        for file in revision.watched {
            println!("cargo:rerun-if-changed={}", file.display());
        }
    }
    println!("cargo:rustc-env=RLDIFF_CODE_VERSION={version}");

    // torch-sys (links = "tch") hands down the library folder of the torch it was built against.
    let torch_lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys gave no library folder"));
    let torch_include = torch_lib.parent().expect("torch's lib folder has a parent").join("include");
    // takes a minute, and a new commit changes nothing about it
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"));
    let made_of = ["build.rs", "csrc/operation.h"].iter().chain(SOURCES).map(PathBuf::from);
    let (compiled, with) = (out.join("compiled"), torch_include.display().to_string());
    let same_torch = fs::read_to_string(&compiled).is_ok_and(|was| was == with);
    if same_torch && is_newer(&compiled, made_of.chain([torch_include.join("torch/version.h")])) {
        println!("cargo:rustc-link-search=native={}", out.display());
        println!("cargo:rustc-link-lib=static=rldiff_csrc");
        println!("cargo:rustc-link-lib=stdc++");
    } else {
        compile(&torch_include);
        fs::write(compiled, with).expect("cargo's folder can be written");
    }

    // DT_RPATH, not DT_RUNPATH: it must also hold for what the libraries themselves load.
    let mut folders = vec!["$ORIGIN/lib".to_string()];
    if let Ok(extra) = env::var("RLDIFF_RPATH") {
        folders.extend(extra.split(':').filter(|p| !p.is_empty()).map(String::from));
    }
    folders.push(torch_lib.display().to_string());
    for beside_torch in ["nvidia/cu13/lib", "nvidia/nccl/lib"] {
        folders.push(torch_lib.join("../..").join(beside_torch).display().to_string());
    }
    println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags");
    for folder in folders {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
}

fn compile(torch_include: &Path) {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .include(torch_include)
        .include(torch_include.join("torch/csrc/api/include"))
        .files(SOURCES)
        .compile("rldiff_csrc");
}

/// Whether `file` exists and was written after all of `than`.
fn is_newer(file: &Path, than: impl IntoIterator<Item = PathBuf>) -> bool {
    let written = |path: &Path| path.metadata().and_then(|of| of.modified()).ok();
    let Some(file) = written(file) else { return false };
    than.into_iter().all(|path| written(&path).is_some_and(|part| part < file))
}
