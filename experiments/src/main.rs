//! The `marimba` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    marimba_experiments::cli::main()
}
