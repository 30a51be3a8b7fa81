//! The program: everything is in the library's `cli`.

/// Run before everything else, the set-up of shared libraries included.
#[used]
#[link_section = ".preinit_array"]
static FIRST: [extern "C" fn(); 2] = [rldiff::signals::note_ignored, ensure_working_folder];

/// Ends the process with a line where the folder it was started in has been removed: MKL, whose beginning is before
/// `main`, would end it with one about a library that it cannot load.
extern "C" fn ensure_working_folder() {
    const MESSAGE: &str = "error: the working folder is gone; go to one that exists\n";
    let mut path = [0u8; 4096];
    // SAFETY: system calls with buffers of the lengths given; nothing is needed that is not there before `main`.
    unsafe {
        let found = libc::syscall(libc::SYS_getcwd, path.as_mut_ptr(), path.len());
        if found < 0 && *libc::__errno_location() == libc::ENOENT {
            libc::write(libc::STDERR_FILENO, MESSAGE.as_ptr().cast(), MESSAGE.len());
            libc::_exit(2);
        }
    }
}

fn main() -> std::process::ExitCode {
    rldiff::cli::main(std::env::args_os())
}
