//! libtorch's side of a GPU: current device, streams, CUDA graphs. `csrc/cuda.cpp` is the other side.

use std::ffi::{c_char, c_int, c_void, CStr};

use anyhow::{bail, Result};

extern "C" {
    fn cuda_last_error() -> *const c_char;
    fn cuda_set_device(index: c_int) -> c_int;
    fn cuda_current_stream(index: c_int, handle: *mut *mut c_void) -> c_int;
    fn cuda_synchronize(index: c_int) -> c_int;
    fn cuda_enter_side_stream(index: c_int, previous: *mut i64) -> c_int;
    fn cuda_restore_stream(previous: *const i64) -> c_int;
    fn cuda_cudnn_version(version: *mut i64) -> c_int;
    fn cuda_empty_cache() -> c_int;
    fn cuda_graph_pool(pool: *mut u64) -> c_int;
    fn cuda_graph_new() -> *mut c_void;
    fn cuda_graph_capture_begin(graph: *mut c_void, pool: *const u64) -> c_int;
    fn cuda_graph_capture_end(graph: *mut c_void) -> c_int;
    fn cuda_graph_replay(graph: *mut c_void) -> c_int;
    fn cuda_graph_delete(graph: *mut c_void) -> c_int;
}

fn last_error() -> String {
    // SAFETY: a string of this thread that lives until the next call.
    unsafe { CStr::from_ptr(cuda_last_error()) }.to_string_lossy().into_owned()
}

fn checked(code: c_int) -> Result<()> {
    if code != 0 {
        bail!("{}", last_error());
    }
    Ok(())
}

/// Makes GPU `index` the one that libtorch uses where none is named.
pub fn set_device(index: usize) -> Result<()> {
    // SAFETY: plain numbers.
    checked(unsafe { cuda_set_device(index as c_int) })
}

/// CUDA's handle of this thread's current stream on GPU `index`; 0 is the default stream.
pub fn current_stream(index: usize) -> Result<usize> {
    let mut handle = std::ptr::null_mut();
    // SAFETY: writes one pointer.
    checked(unsafe { cuda_current_stream(index as c_int, &mut handle) })?;
    Ok(handle as usize)
}

/// Returns when GPU `index` has done everything it was given.
pub fn synchronize(index: usize) -> Result<()> {
    // SAFETY: plain numbers.
    checked(unsafe { cuda_synchronize(index as c_int) })
}

/// Version of the cuDNN in use, 91900 for 9.19.0; 0 where libtorch was built without.
pub fn cudnn() -> Result<i64> {
    let mut version = 0;
    // SAFETY: writes one number.
    checked(unsafe { cuda_cudnn_version(&mut version) })?;
    Ok(version)
}

/// While it lives, this thread's work goes to a stream beside the one before.
pub struct SideStream {
    previous: [i64; 3],
}

impl SideStream {
    pub fn enter(index: usize) -> Result<Self> {
        let mut previous = [0; 3];
        // SAFETY: writes three numbers.
        checked(unsafe { cuda_enter_side_stream(index as c_int, previous.as_mut_ptr()) })?;
        Ok(SideStream { previous })
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        // SAFETY: reads three numbers that enter() wrote; it cannot fail for a stream that was current.
        unsafe { cuda_restore_stream(self.previous.as_ptr()) };
    }
}

/// Gives memory that libtorch holds and nobody uses back to the driver.
pub fn empty_cache() -> Result<()> {
    // SAFETY: no arguments.
    checked(unsafe { cuda_empty_cache() })
}

/// Memory that recordings share: what one works with, the next may use. So they are replayed on one stream, one after the
/// other, and what a replay gives holds until the next one of any of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GraphPool {
    id: [u64; 2],
}

impl GraphPool {
    pub fn new() -> Result<Self> {
        let mut id = [0; 2];
        // SAFETY: writes two numbers.
        checked(unsafe { cuda_graph_pool(id.as_mut_ptr()) })?;
        Ok(GraphPool { id })
    }
}

/// Work that was recorded once and can be replayed; its memory is of a [`GraphPool`].
pub struct CudaGraph {
    graph: *mut c_void,
}

impl CudaGraph {
    /// Records what `work` gives to GPU `index`, and what it returns (tensors of the graph's pool, which every replay
    /// writes anew). The work must not wait for the GPU. Nothing is computed yet.
    pub fn record<T>(pool: GraphPool, work: impl FnOnce() -> T) -> Result<(Self, T)> {
        // SAFETY: no arguments.
        let graph = unsafe { cuda_graph_new() };
        if graph.is_null() {
            bail!("{}", last_error());
        }
        let recorded = CudaGraph { graph };
        // SAFETY: a graph that cuda_graph_new made, and two numbers.
        checked(unsafe { cuda_graph_capture_begin(graph, pool.id.as_ptr()) })?;
        let made = work();
        // SAFETY: as above, while it records.
        checked(unsafe { cuda_graph_capture_end(graph) })?;
        Ok((recorded, made))
    }

    /// Does the recorded work on this thread's current stream.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: a graph that was recorded.
        checked(unsafe { cuda_graph_replay(self.graph) })
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // SAFETY: a graph that cuda_graph_new made and nobody uses any more.
        unsafe { cuda_graph_delete(self.graph) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_libtorch_cuda_everything_is_an_error() {
        if tch::Cuda::is_available() {
            return;
        }
        assert!(current_stream(0).is_err() && set_device(0).is_err() && SideStream::enter(0).is_err());
        let error = GraphPool::new().expect_err("no GPU, no graph").to_string();
        assert!(error.contains("_ZN2at4cuda17graph_pool_handleEv"), "{error}");
        let error = CudaGraph::record(GraphPool { id: [0; 2] }, || ()).err().expect("no GPU, no graph").to_string();
        assert!(error.contains("_ZN2at4cuda17graph_pool_handleEv"), "{error}");
    }
}
