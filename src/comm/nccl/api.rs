//! NCCL's functions, found in the library at run time.

use std::ffi::{c_char, c_int, c_void, CStr};

use anyhow::{ensure, Result};
use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};

use crate::device::parts;

/// ncclSuccess and ncclInProgress.
pub(super) const FINE: [c_int; 2] = [0, 7];

/// NCCL's functions.
pub(super) struct Api {
    pub get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    pub get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> c_int,
    pub init_rank: unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> c_int,
    pub all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        ncclRedOp_t,
        ncclComm_t,
        cudaStream_t,
    ) -> c_int,
    pub get_async_error: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int,
    pub abort: unsafe extern "C" fn(ncclComm_t) -> c_int,
    pub destroy: unsafe extern "C" fn(ncclComm_t) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
}

/// The function `name` of a library. `F` must be the type of a pointer to it.
///
/// # Safety
/// `library` is open, and the function is of type `F`.
unsafe fn function<F: Copy>(library: *mut c_void, name: &CStr) -> Result<F> {
    let pointer = unsafe { libc::dlsym(library, name.as_ptr()) };
    ensure!(!pointer.is_null(), "NCCL has no function {}", name.to_string_lossy());
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
    Ok(unsafe { std::mem::transmute_copy(&pointer) })
}

impl Api {
    pub fn open() -> Result<Self> {
        let library = parts::open_nccl()?;
        // SAFETY: an open library, which is never closed; the types are those of nccl.h (2.18 and later).
        unsafe {
            Ok(Api {
                get_version: function(library, c"ncclGetVersion")?,
                get_unique_id: function(library, c"ncclGetUniqueId")?,
                init_rank: function(library, c"ncclCommInitRank")?,
                all_reduce: function(library, c"ncclAllReduce")?,
                get_async_error: function(library, c"ncclCommGetAsyncError")?,
                abort: function(library, c"ncclCommAbort")?,
                destroy: function(library, c"ncclCommDestroy")?,
                get_error_string: function(library, c"ncclGetErrorString")?,
            })
        }
    }

    pub fn describe(&self, code: c_int) -> String {
        // SAFETY: NCCL gives a string constant for any code.
        unsafe { CStr::from_ptr((self.get_error_string)(code)) }.to_string_lossy().into_owned()
    }

    pub fn checked(&self, what: &str, code: c_int) -> Result<()> {
        ensure!(FINE.contains(&code), "NCCL: {what}: {}", self.describe(code));
        Ok(())
    }
}

/// Version of the library, as 2.28.3.
pub fn version() -> Result<String> {
    let api = Api::open()?;
    let mut version = 0;
    // SAFETY: writes one number.
    api.checked("version", unsafe { (api.get_version)(&mut version) })?;
    Ok(format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100))
}
