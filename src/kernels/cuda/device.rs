//! One NVIDIA GPU with all kernels loaded.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use anyhow::{ensure, Context, Result};
use cudarc::driver::{result, sys, CudaContext, CudaFunction};
use cudarc::nvrtc::Ptx;

use super::compile::{cache_folder, compile_cached, Architecture, Toolkit, SOURCES};
use super::shared::received;
use super::Machine;

/// Is there an NVIDIA driver (libcuda.so.1)? Ask before anything else here: cudarc panics without one.
pub fn is_driver_present() -> bool {
    // SAFETY: only tries to load the library; its initialisers are NVIDIA's
    unsafe { sys::is_culib_present() }
}

/// A device, in the context that libtorch uses too, and its kernels.
#[derive(Clone)]
pub struct Gpu {
    context: Arc<CudaContext>,
    kernels: Arc<HashMap<&'static str, CudaFunction>>,
    architecture: Architecture,
    /// Where kernels are launched; null is the legacy default stream.
    stream: u64,
}

impl Gpu {
    /// Number of devices; 0 without a driver.
    pub fn count() -> Result<usize> {
        if !is_driver_present() {
            return Ok(0);
        }
        match result::init() {
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
            other => other.context("the NVIDIA driver does not start")?,
        }
        Ok(CudaContext::device_count().context("the NVIDIA driver does not count its devices")? as usize)
    }

    /// Opens device `ordinal` with the kernels that rank 0 has sent, else takes them from the cache or compiles them.
    ///
    /// # Errors
    /// No driver, no such device, no NVRTC, kernels that do not compile (with NVRTC's log).
    pub fn open(ordinal: usize) -> Result<Self> {
        ensure!(is_driver_present(), "there is no NVIDIA driver (libcuda.so.1)");
        let count = Gpu::count()?;
        ensure!(ordinal < count, "there is no CUDA device {ordinal}: the driver sees {count}");
        let context = CudaContext::new(ordinal).with_context(|| format!("CUDA device {ordinal} cannot be opened"))?;
        let (major, minor) = context.compute_capability()?;
        let architecture = Architecture { major: major as u32, minor: minor as u32 };
        let mut kernels = HashMap::new();
        for source in &SOURCES {
            let cubin = match received(source, architecture) {
                Some(cubin) => cubin,
                None => {
                    let mut toolkit = || Toolkit::find(&[]);
                    compile_cached(source, architecture, cache_folder().as_deref(), &mut toolkit)?.cubin
                }
            };
            let module = context
                .load_module(Ptx::from_binary(cubin))
                .with_context(|| format!("the driver refuses the compiled kernels of cuda/{}.cu", source.name))?;
            for &kernel in source.kernels {
                let function = module.load_function(kernel).with_context(|| format!("kernel {kernel} is missing"))?;
                kernels.insert(kernel, function);
            }
        }
        Ok(Gpu { context, kernels: Arc::new(kernels), architecture, stream: 0 })
    }

    pub fn name(&self) -> Result<String> {
        Ok(self.context.name()?)
    }

    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Waits for all work on the device; the error of a kernel that failed comes out here.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.context.synchronize()?)
    }
}

impl Machine for Gpu {
    unsafe fn launch(&self, kernel: &str, grid: [u32; 2], threads: u32, arguments: &[*const c_void]) -> Result<()> {
        let function = self.kernels.get(kernel).with_context(|| format!("there is no kernel {kernel}"))?;
        // autograd calls from threads of its own
        self.context.bind_to_thread()?;
        let mut arguments: Vec<*mut c_void> = arguments.iter().map(|pointer| pointer.cast_mut()).collect();
        result::launch_kernel(
            function.cu_function(),
            (grid[0], grid[1], 1),
            (threads, 1, 1),
            0,
            self.stream as sys::CUstream,
            &mut arguments,
        )
        .with_context(|| format!("launching {kernel} with {grid:?} blocks of {threads} threads"))
    }

    fn on_stream(&self, stream: u64) -> Arc<dyn Machine> {
        Arc::new(Gpu { stream, ..self.clone() })
    }

    fn device(&self) -> tch::Device {
        tch::Device::Cuda(self.context.ordinal())
    }
}
