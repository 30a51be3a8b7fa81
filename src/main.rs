/// Runs before everything else, the set-up of shared libraries included.
#[used]
#[link_section = ".preinit_array"]
static FIRST: extern "C" fn() = rldiff::signals::note_ignored;

fn main() -> std::process::ExitCode {
    rldiff::cli::main(std::env::args_os())
}
