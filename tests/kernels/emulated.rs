//! A machine that runs the unchanged CUDA sources on the host, through g++ and `host_emulation.h`.

use std::collections::HashMap;
use std::ffi::{c_void, CStr, CString};
use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

use anyhow::{Context, Result};
use rldiff::kernels::cuda::{Machine, Source, SOURCES};

type Kernel = unsafe extern "C" fn(*const u32, u32, *const *const c_void, i32);

struct Shared {
    kernels: HashMap<&'static str, Kernel>,
    /// The emulation has one set of fibers per library.
    running: Mutex<()>,
}

/// The emulated device.
#[derive(Clone)]
pub struct Emulated {
    shared: Arc<Shared>,
    /// Order of blocks, warps and lanes.
    descending: bool,
}

/// The emulation in ascending and in descending order of threads, compiled once per process.
pub fn machines() -> [Arc<dyn Machine>; 2] {
    static SHARED: OnceLock<Arc<Shared>> = OnceLock::new();
    let shared = SHARED.get_or_init(|| {
        let kernels = SOURCES.iter().flat_map(compile).collect();
        Arc::new(Shared { kernels, running: Mutex::new(()) })
    });
    [false, true].map(|descending| Arc::new(Emulated { shared: shared.clone(), descending }) as Arc<dyn Machine>)
}

fn compile(source: &Source) -> Vec<(&'static str, Kernel)> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let mut text = format!("#include \"{}.cu\"\n", source.name);
    for kernel in source.kernels {
        writeln!(text, "EMULATE({kernel})").unwrap();
    }
    let (main, library) = (folder.path().join("emulated.cpp"), folder.path().join("emulated.so"));
    std::fs::write(&main, text).unwrap();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-gnu-unique"])
        .args(["-Wall", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Werror", "-DHOST_EMULATION", "-include"])
        .arg(project.join("tests/kernels/host_emulation.h"))
        .arg("-I")
        .arg(project.join("cuda"))
        .arg(&main)
        .arg("-o")
        .arg(&library)
        .output()
        .unwrap_or_else(|e| panic!("cannot start {compiler}: {e}"));
    assert!(output.status.success(), "{}.cu: {}", source.name, String::from_utf8_lossy(&output.stderr));
    let path = CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: a library without initialisers, which stays loaded
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    // SAFETY: dlerror gives a C string after a failure
    assert!(!handle.is_null(), "{:?}", unsafe { CStr::from_ptr(libc::dlerror()) });
    let symbol = |kernel: &&'static str| {
        let name = CString::new(format!("emulate_{kernel}")).unwrap();
        // SAFETY: a live handle; EMULATE defines the function with this type
        let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
        assert!(!address.is_null(), "{kernel} is missing");
        // SAFETY: as above
        (*kernel, unsafe { std::mem::transmute::<*mut c_void, Kernel>(address) })
    };
    source.kernels.iter().map(symbol).collect()
}

impl Machine for Emulated {
    unsafe fn launch(&self, kernel: &str, grid: [u32; 2], threads: u32, arguments: &[*const c_void]) -> Result<()> {
        let function = self.shared.kernels.get(kernel).with_context(|| format!("there is no kernel {kernel}"))?;
        let _one = self.shared.running.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        function(grid.as_ptr(), threads, arguments.as_ptr(), i32::from(self.descending));
        Ok(())
    }

    fn on_stream(&self, _: u64) -> Arc<dyn Machine> {
        Arc::new(self.clone())
    }

    fn device(&self) -> tch::Device {
        tch::Device::Cpu
    }
}
