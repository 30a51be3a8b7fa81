//! What a GPU needs to be used, and whether it is here: driver, device, libtorch_cuda, NVRTC, NCCL. Everything is opened
//! at run time, so one binary runs with and without.

use std::{
    ffi::{CStr, CString},
    os::raw::c_void,
    path::Path,
};

use anyhow::{anyhow, ensure, Context, Result};
use cudarc::{driver, nvrtc};

/// A GPU as the driver sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    pub name: String,
    /// The same for all processes of a machine, whatever CUDA_VISIBLE_DEVICES hides from them.
    pub uuid: [u8; 16],
    pub bytes: usize,
    /// Major and minor version.
    pub compute_capability: (i32, i32),
}

/// NVIDIA's driver. `Err` names what is missing.
pub fn driver() -> Result<()> {
    // cudarc panics where libcuda is missing: ask first
    // SAFETY: only opens a library.
    ensure!(unsafe { driver::sys::is_culib_present() }, "no NVIDIA driver: libcuda.so.1 was not found");
    driver::result::init().map_err(|e| anyhow!("the NVIDIA driver does not start: {}", describe(e)))
}

fn describe(error: driver::result::DriverError) -> String {
    match error.error_string() {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => format!("{error:?}"),
    }
}

/// CUDA version that the driver supports, as 13.0.
pub fn driver_version() -> Result<String> {
    driver()?;
    let mut version = 0;
    // SAFETY: writes one number.
    unsafe { driver::sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| anyhow!(describe(e)))?;
    Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
}

/// The GPUs that this process may use; at least one.
pub fn gpus() -> Result<Vec<Gpu>> {
    driver()?;
    let failed = |e| anyhow!("the NVIDIA driver cannot list its devices: {}", describe(e));
    let count = driver::result::device::get_count().map_err(failed)?;
    ensure!(count > 0, "no CUDA device: the driver sees none (is CUDA_VISIBLE_DEVICES empty?)");
    let gpu = |index| -> Result<Gpu, driver::result::DriverError> {
        use driver::sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        let device = driver::result::device::get(index)?;
        // SAFETY: `device` is a handle that the driver has just given.
        let (bytes, major, minor) = unsafe {
            (
                driver::result::device::total_mem(device)?,
                driver::result::device::get_attribute(device, MAJOR)?,
                driver::result::device::get_attribute(device, MINOR)?,
            )
        };
        Ok(Gpu {
            name: driver::result::device::get_name(device)?,
            uuid: driver::result::device::get_uuid(device)?.bytes.map(|b| b as u8),
            bytes,
            compute_capability: (major, minor),
        })
    };
    (0..count).map(gpu).collect::<Result<_, _>>().map_err(failed)
}

/// Opens libtorch's CUDA half for the whole process. Call it before the first tensor: libtorch decides once what it can do.
pub fn open_libtorch_cuda() -> Result<()> {
    open(c"libtorch_cuda.so", libc::RTLD_NOW | libc::RTLD_GLOBAL).map(drop).context("libtorch_cuda does not load")
}

/// Opens a library; the error is the dynamic linker's.
pub fn open(name: &CStr, flags: i32) -> Result<*mut c_void> {
    // SAFETY: `name` is a C string; the library's initialisers are those of a system library.
    let handle = unsafe { libc::dlopen(name.as_ptr(), flags) };
    if handle.is_null() {
        // SAFETY: dlopen failed, so there is a message; it lives until the next call.
        let message = unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned();
        return Err(anyhow!(message));
    }
    Ok(handle)
}

/// NVRTC, which compiles the kernels. `Err` says that it is missing.
pub fn nvrtc() -> Result<()> {
    // SAFETY: only opens a library.
    ensure!(unsafe { nvrtc::sys::is_culib_present() }, "no NVRTC: libnvrtc.so.13 was not found");
    Ok(())
}

pub fn nvrtc_version() -> Result<String> {
    nvrtc()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers.
    unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|e| anyhow!("NVRTC: {e:?}"))?;
    Ok(format!("{major}.{minor}"))
}

/// Compiles a kernel of one line; needs no GPU.
pub fn nvrtc_works() -> Result<()> {
    nvrtc()?;
    let source = "extern \"C\" __global__ void fill(float *x) { x[threadIdx.x] = 1.0f; }";
    let ptx = nvrtc::compile_ptx(source).map_err(|e| anyhow!("NVRTC cannot compile a kernel: {e:?}"))?;
    ensure!(ptx.to_src().contains("fill"), "NVRTC compiled a kernel to nothing");
    Ok(())
}

/// Path of a library that this process has loaded, by the beginning of its file name.
pub fn loaded_library(stem: &str) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut paths = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
    let named = |path: &&str| {
        let file = Path::new(path).file_name().and_then(|name| name.to_str());
        file.is_some_and(|file| file.starts_with(stem))
    };
    paths.find(named).map(String::from)
}

/// The folder of this machine's libnccl.so.2 may be known only to libtorch_cuda, which needs it too; these names cover
/// both, and a development install.
pub fn open_nccl() -> Result<*mut c_void> {
    let mut errors = Vec::new();
    for name in ["libnccl.so.2", "libnccl.so"] {
        let c_name = CString::new(name).expect("no zero inside");
        match open(&c_name, libc::RTLD_NOW | libc::RTLD_LOCAL) {
            Ok(handle) => return Ok(handle),
            Err(e) => errors.push(e.to_string()),
        }
    }
    Err(anyhow!("no NCCL: {}", errors.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let error = open(c"libnothing-of-the-kind.so.9", libc::RTLD_NOW).unwrap_err().to_string();
        assert!(error.contains("libnothing-of-the-kind.so.9"), "{error}");
        if let Err(e) = gpus() {
            let text = e.to_string();
            assert!(text.contains("driver") || text.contains("device"), "{text}");
        }
        assert!(loaded_library("libtorch_cpu").is_some_and(|path| path.ends_with(".so")));
    }
}
