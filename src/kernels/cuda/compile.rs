//! The CUDA sources, NVRTC that compiles them, and the folder where the result is kept.
//!
//! The sources are part of the binary. NVRTC is a library (libnvrtc.so.13, in the wheel nvidia-cuda-nvrtc, which comes
//! with PyTorch, or in a CUDA toolkit), so nothing of CUDA is needed to build rldiff. A compiled kernel is kept under
//! `RLDIFF_CACHE`, else `$XDG_CACHE_HOME/rldiff`, else `~/.cache/rldiff`, by the SHA-256 of its source, options and
//! architecture, and checked by a digest when it is read.

use std::ffi::{c_char, c_int, CStr, CString};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context, Result};
use cudarc::nvrtc::sys;
use sha2::{Digest, Sha256};

use crate::telemetry::write_atomic;

/// One file of `cuda/`.
#[derive(Debug)]
pub struct Source {
    /// Name of the operation.
    pub name: &'static str,
    pub text: &'static str,
    /// The kernels in it.
    pub kernels: &'static [&'static str],
}

macro_rules! source {
    ($name:literal, [$($kernel:literal),* $(,)?]) => {
        Source { name: $name, text: include_str!(concat!("../../../cuda/", $name, ".cu")), kernels: &[$($kernel),*] }
    };
}

/// What the sources include.
const HEADERS: [(&str, &str); 5] = [
    ("columns.cuh", include_str!("../../../cuda/columns.cuh")),
    ("common.cuh", include_str!("../../../cuda/common.cuh")),
    ("pack.cuh", include_str!("../../../cuda/pack.cuh")),
    ("philox.cuh", include_str!("../../../cuda/philox.cuh")),
    ("transition.cuh", include_str!("../../../cuda/transition.cuh")),
];

/// All kernels.
pub const SOURCES: [Source; 7] = [
    source!("normal_rows", ["normal_rows", "philox_words"]),
    source!(
        "ddim_step",
        [
            "ddim_step_draw_f32",
            "ddim_step_draw_bf16",
            "ddim_step_draw_f16",
            "ddim_step_score_f32",
            "ddim_step_score_bf16",
            "ddim_step_score_f16",
        ]
    ),
    source!("clipped_surrogate", ["clipped_surrogate_f32", "clipped_surrogate_bf16", "clipped_surrogate_f16"]),
    source!(
        "adamw",
        [
            "adamw_f32",
            "adamw_bf16",
            "adamw_f16",
            "sum_of_squares_f32",
            "sum_of_squares_bf16",
            "sum_of_squares_f16",
            "sum_of_partials",
        ]
    ),
    source!(
        "geglu",
        [
            "geglu_forward_f32",
            "geglu_forward_bf16",
            "geglu_forward_f16",
            "geglu_backward_f32",
            "geglu_backward_bf16",
            "geglu_backward_f16",
        ]
    ),
    source!(
        "layer_norm",
        [
            "layer_norm_forward_f32",
            "layer_norm_forward_bf16",
            "layer_norm_forward_f16",
            "layer_norm_backward_f32",
            "layer_norm_backward_bf16",
            "layer_norm_backward_f16",
            "layer_norm_backward_sums_f32",
            "layer_norm_backward_sums_bf16",
            "layer_norm_backward_sums_f16",
            "layer_norm_backward_parameters",
        ]
    ),
    source!(
        "group_norm_silu",
        [
            "group_norm_silu_sums_f32",
            "group_norm_silu_sums_bf16",
            "group_norm_silu_sums_f16",
            "group_norm_silu_statistics_f32",
            "group_norm_silu_statistics_bf16",
            "group_norm_silu_statistics_f16",
            "group_norm_silu_forward_f32",
            "group_norm_silu_forward_bf16",
            "group_norm_silu_forward_f16",
            "group_norm_silu_backward_sums_f32",
            "group_norm_silu_backward_sums_bf16",
            "group_norm_silu_backward_sums_f16",
            "group_norm_silu_backward_f32",
            "group_norm_silu_backward_bf16",
            "group_norm_silu_backward_f16",
            "group_norm_silu_backward_groups",
            "group_norm_silu_backward_parameters",
        ]
    ),
];

/// No contraction of products and sums (see `cuda/common.cuh`); `-v` puts registers and spills into the log.
const OPTIONS: [&str; 3] = ["--std=c++17", "--fmad=false", "--ptxas-options=-v"];

/// Compute capability, for example 9.0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Architecture {
    pub major: u32,
    pub minor: u32,
}

impl Architecture {
    fn name(self) -> String {
        format!("sm_{}{}", self.major, self.minor)
    }
}

/// A cubin and what the compiler said.
#[derive(Debug)]
pub struct Compiled {
    pub cubin: Vec<u8>,
    /// Registers and spills of each kernel; empty if the cubin was in the cache.
    pub log: String,
}

/// NVRTC, loaded, and the folder with cuda_bf16.h.
#[derive(Debug)]
pub struct Toolkit {
    include: PathBuf,
    version: (i32, i32),
}

impl Toolkit {
    /// Looks in `first` (folders with `lib` and `include`), CUDA_HOME, CUDA_PATH, `cuda` beside the executable, beside
    /// the libtorch in use (nvidia/cu13), and /usr/local/cuda; for the library also where the loader looks.
    ///
    /// # Errors
    /// The library or the headers are missing: says where it looked.
    pub fn find(first: &[PathBuf]) -> Result<Self> {
        let roots = roots(first);
        let looked = roots.iter().map(|r| r.display().to_string()).collect::<Vec<_>>().join(", ");
        let _preloaded = roots.iter().find(|root| load_nvrtc(root));
        // SAFETY: only tries to load the library; its initialisers are NVIDIA's
        ensure!(
            unsafe { sys::is_culib_present() },
            "NVRTC (libnvrtc.so.13) is missing: install nvidia-cuda-nvrtc or set CUDA_HOME; looked in {looked}"
        );
        let has_headers = |root: &&PathBuf| root.join("include/cuda_bf16.h").is_file();
        let include = roots.iter().find(has_headers).map(|root| root.join("include")).with_context(|| {
            format!("cuda_bf16.h is missing: install nvidia-cuda-runtime or set CUDA_HOME; looked in {looked}")
        })?;
        let mut version = (0, 0);
        // SAFETY: the library is loaded; the pointers are valid for the call
        check(unsafe { sys::nvrtcVersion(&mut version.0, &mut version.1) })?;
        Ok(Toolkit { include, version })
    }

    /// Version of NVRTC.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Folder of CUDA's headers.
    pub fn include(&self) -> &Path {
        &self.include
    }
}

fn roots(first: &[PathBuf]) -> Vec<PathBuf> {
    let mut roots = first.to_vec();
    roots.extend(["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os).map(PathBuf::from));
    if let Some(folder) = std::env::current_exe().ok().as_deref().and_then(Path::parent) {
        roots.push(folder.join("cuda"));
    }
    // …/site-packages/torch/lib/libtorch_cpu.so
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let libtorch =
        maps.lines().find_map(|line| line.find('/').map(|at| &line[at..]).filter(|p| p.contains("/libtorch_cpu")));
    if let Some(packages) = libtorch.and_then(|path| Path::new(path).ancestors().nth(3)) {
        roots.push(packages.join("nvidia/cu13"));
    }
    roots.push("/usr/local/cuda".into());
    roots
}

/// Loads NVRTC of `root`, if it is there, so that loading it by name finds it. NVRTC in turn loads its builtins by name.
fn load_nvrtc(root: &Path) -> bool {
    let libraries = ["lib", "lib64"].map(|folder| root.join(folder));
    let files = libraries.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten().map(|f| f.path());
    let files: Vec<PathBuf> = files.collect();
    let find = |prefix: &str| {
        let matches = |path: &&PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix));
        files.iter().find(matches)
    };
    let (Some(builtins), Some(nvrtc)) = (find("libnvrtc-builtins.so.13"), find("libnvrtc.so.13")) else { return false };
    [builtins, nvrtc].iter().all(|path| {
        let path = CString::new(path.as_os_str().as_encoded_bytes()).expect("a path has no NUL");
        // SAFETY: a valid C string; the library stays loaded
        !unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null()
    })
}

fn check(result: sys::nvrtcResult) -> Result<()> {
    if result == sys::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: NVRTC returns a static string for every code
    let text = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) };
    bail!("NVRTC: {}", text.to_string_lossy())
}

/// An NVRTC program; destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Program {
    fn new(source: &Source) -> Result<Self> {
        let c_string = |text: &str| CString::new(text).context("a NUL in a CUDA source");
        let (text, name) = (c_string(source.text)?, c_string(&format!("{}.cu", source.name))?);
        let header_texts = HEADERS.iter().map(|(_, text)| c_string(text)).collect::<Result<Vec<_>>>()?;
        let header_names = HEADERS.iter().map(|(name, _)| c_string(name)).collect::<Result<Vec<_>>>()?;
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (texts, names) = (pointers(&header_texts), pointers(&header_names));
        let mut program = Program(std::ptr::null_mut());
        // SAFETY: all pointers are to C strings that live through the call; NVRTC copies them
        check(unsafe {
            sys::nvrtcCreateProgram(
                &mut program.0,
                text.as_ptr(),
                name.as_ptr(),
                HEADERS.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        })?;
        Ok(program)
    }

    fn log(&self) -> Result<String> {
        let mut length = 0;
        // SAFETY: a live program; the log is a C string of `length` bytes with its NUL
        check(unsafe { sys::nvrtcGetProgramLogSize(self.0, &mut length) })?;
        let mut log = vec![0u8; length];
        // SAFETY: as above
        check(unsafe { sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast::<c_char>()) })?;
        log.truncate(length.saturating_sub(1));
        Ok(String::from_utf8_lossy(&log).into_owned())
    }

    fn cubin(&self) -> Result<Vec<u8>> {
        let mut length = 0;
        // SAFETY: a live, compiled program; the cubin has `length` bytes
        check(unsafe { sys::nvrtcGetCUBINSize(self.0, &mut length) })?;
        let mut cubin = vec![0u8; length];
        // SAFETY: as above
        check(unsafe { sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast::<c_char>()) })?;
        Ok(cubin)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by nvrtcCreateProgram, destroyed once; of a null program it only returns an error
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

/// Compiles one source for one architecture, without the cache.
///
/// # Errors
/// The source does not compile: the error holds NVRTC's log.
pub fn compile(source: &Source, architecture: Architecture, toolkit: &Toolkit) -> Result<Compiled> {
    let program = Program::new(source)?;
    let mut options: Vec<String> = OPTIONS.iter().map(ToString::to_string).collect();
    options.push(format!("--gpu-architecture={}", architecture.name()));
    options.push(format!("--include-path={}", toolkit.include.display()));
    let options = options.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>()?;
    let pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
    // SAFETY: a live program; the options are C strings that live through the call
    let result = check(unsafe { sys::nvrtcCompileProgram(program.0, pointers.len() as c_int, pointers.as_ptr()) });
    let log = program.log()?;
    result.with_context(|| {
        let (major, minor) = toolkit.version;
        format!("cuda/{}.cu does not compile for {} (NVRTC {major}.{minor}):\n{log}", source.name, architecture.name())
    })?;
    Ok(Compiled { cubin: program.cubin()?, log })
}

/// The cubin of `source` from the cache, else compiled and put there. `toolkit` is asked for only if it is needed.
pub(super) fn compile_cached(
    source: &Source,
    architecture: Architecture,
    folder: Option<&Path>,
    toolkit: &mut dyn FnMut() -> Result<Toolkit>,
) -> Result<Compiled> {
    let path = folder.map(|folder| folder.join(cache_name(source, architecture)));
    if let Some(cubin) = path.as_deref().and_then(read_cached) {
        return Ok(Compiled { cubin, log: String::new() });
    }
    let compiled = compile(source, architecture, &toolkit()?)?;
    if let Some(path) = path {
        if let Err(error) = keep(&path, &compiled.cubin) {
            log::warn!("compiled kernels are not kept: {error:#}");
        }
    }
    Ok(compiled)
}

/// The folder for compiled kernels; None where the environment names no home.
pub(super) fn cache_folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = variable("RLDIFF_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|folder| folder.join("rldiff")))
        .or_else(|| variable("HOME").map(|folder| folder.join(".cache/rldiff")))?;
    Some(folder.join("kernels"))
}

fn cache_name(source: &Source, architecture: Architecture) -> String {
    let mut hash = Sha256::new();
    let headers = HEADERS.iter().map(|(_, text)| *text);
    for part in OPTIONS.into_iter().chain([source.text]).chain(headers) {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let digest: String = hash.finalize().iter().take(12).map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{digest}.cubin", source.name, architecture.name())
}

/// Writes a cubin and its digest, making the folder.
fn keep(path: &Path, cubin: &[u8]) -> Result<()> {
    let folder = path.parent().expect("a file of the cache lies in its folder");
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    write_atomic(path, &[cubin, &Sha256::digest(cubin)].concat())
}

/// None if the file is missing or damaged.
fn read_cached(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let digest = bytes.split_off(bytes.len().checked_sub(32)?);
    (Sha256::digest(&bytes).as_slice() == digest).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOPPER: Architecture = Architecture { major: 9, minor: 0 };

    #[test]
    fn every_kernel_is_in_its_source_and_every_header_is_embedded() {
        for source in &SOURCES {
            for kernel in source.kernels {
                let stem = ["_f32", "_bf16", "_f16"].iter().fold(*kernel, |name, end| name.trim_end_matches(end));
                assert!(source.text.contains(stem), "{kernel} is not in {}.cu", source.name);
            }
            for line in source.text.lines().filter_map(|line| line.strip_prefix("#include \"")) {
                assert!(HEADERS.iter().any(|(name, _)| line.trim_end_matches('"') == *name), "{line}");
            }
        }
    }

    #[test]
    fn the_cache_returns_what_was_kept_and_refuses_damage() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("kernels");
        let path = folder.join(cache_name(&SOURCES[0], HOPPER));
        keep(&path, b"a cubin").unwrap();
        let mut no_toolkit = || bail!("asked for NVRTC");
        let kept = compile_cached(&SOURCES[0], HOPPER, Some(&folder), &mut no_toolkit).unwrap();
        assert_eq!(kept.cubin, b"a cubin");
        let mut bytes = fs::read(&path).unwrap();
        bytes[2] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let error = compile_cached(&SOURCES[0], HOPPER, Some(&folder), &mut no_toolkit).unwrap_err();
        assert_eq!(error.to_string(), "asked for NVRTC");
        assert!(read_cached(&folder.join("absent")).is_none());
    }

    #[test]
    fn the_name_in_the_cache_tells_sources_and_architectures_apart() {
        let ampere = Architecture { major: 8, minor: 0 };
        let edited = Source { name: "normal_rows", text: "other", kernels: &[] };
        let names = [cache_name(&SOURCES[0], HOPPER), cache_name(&SOURCES[0], ampere), cache_name(&edited, HOPPER)];
        assert!(names[0] != names[1] && names[0] != names[2], "{names:?}");
        assert!(names[0].starts_with("normal_rows-sm_90-"), "{names:?}");
    }
}
