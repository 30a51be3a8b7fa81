//! Compiles the C++ shim and tells the linker where libtorch lies, so that the binary runs without any environment set.
use std::{env, path::PathBuf};

/// C++ over libtorch.
const SHIM: [&str; 2] = ["csrc/shim.cpp", "csrc/group_norm_silu.cpp"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for file in SHIM {
        println!("cargo:rerun-if-changed={file}");
    }
    println!("cargo:rerun-if-env-changed=RLDIFF_RPATH");

    // torch-sys (links = "tch") hands down the library folder of the torch it was built against.
    let torch_lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys gave no library folder"));
    let torch_include = torch_lib.parent().expect("torch's lib folder has a parent").join("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .include(&torch_include)
        .include(torch_include.join("torch/csrc/api/include"))
        .files(SHIM)
        .compile("rldiff_shim");

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
