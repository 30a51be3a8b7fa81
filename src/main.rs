fn main() -> std::process::ExitCode {
    rldiff::cli::main(std::env::args_os())
}
