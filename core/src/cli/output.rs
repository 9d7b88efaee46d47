//! What subcommands print that need no collector: completion scripts, manual pages, text.

use std::io::{self, Write};

use clap::CommandFactory;
use clap_complete::Shell;

use super::Cli;
use crate::config;
use crate::error::{Error, Result};

/// Writes the completion script of a shell.
///
/// # Errors
/// Writing fails; a closed pipe counts as success.
pub fn write_completions(shell: Shell, out: &mut dyn Write) -> Result<()> {
    // Into memory first: the generator panics when it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "memleak", &mut script);
    write_all(out, &script, "the completion script")
}

/// Writes the manual page, or that of one subcommand.
///
/// # Errors
/// No such subcommand, or writing fails; a closed pipe counts as success.
pub fn write_man(subcommand: Option<&str>, out: &mut dyn Write) -> Result<()> {
    let mut root = Cli::command();
    // Names the pages of subcommands `memleak-check` and so on.
    root.build();
    let command = match subcommand {
        None => root,
        Some(name) => {
            let names: Vec<&str> = root.get_subcommands().map(clap::Command::get_name).collect();
            root.find_subcommand(name).cloned().ok_or_else(|| {
                let hint = config::nearest(name, names.iter().copied());
                let hint = hint.map_or(String::new(), |n| format!("; did you mean {n:?}?"));
                Error::config(format!("no subcommand {name:?}{hint} There are {}", names.join(", ")))
            })?
        }
    };
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page).map_err(|e| Error::io("failed to make the manual page", e))?;
    write_all(out, &page, "the manual page")
}

/// Prints what was asked for.
///
/// # Errors
/// Standard output cannot be written; a closed pipe counts as success.
pub fn print(text: &str) -> Result<()> {
    write_all(&mut io::stdout(), text.as_bytes(), "to standard output")
}

fn write_all(out: &mut dyn Write, bytes: &[u8], what: &str) -> Result<()> {
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Error::io(format!("failed to write {what}"), e)),
        _ => Ok(()),
    }
}

/// Whether an error comes down to a closed pipe (`memleak ... | head`): the reader has seen enough, which is success.
pub fn is_closed_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    let closed = |e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe;
    std::iter::successors(Some(error), |e| e.source()).any(|e| e.downcast_ref().is_some_and(closed))
}
