//! The columns of the benchmark: what a program is run under.

use std::fmt;

/// How a tool gets at a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// memleak with these settings: attaches to the running program and lets go of it.
    Attach(&'static [&'static str]),
    /// The program is started again, below this command; `{}` stands for a folder that may be written to.
    Relaunch(&'static [&'static str]),
    /// The program is compiled again with AddressSanitizer, and started again.
    Rebuild,
}

/// One column.
#[derive(Debug, PartialEq, Eq)]
pub struct Tool {
    /// What it is called in options and in JSON.
    pub id: &'static str,
    /// What it is called in the table.
    pub title: &'static str,
    /// How it gets at the program.
    pub kind: Kind,
    /// Load before the measurement begins, in seconds, so that the tool has got used to it.
    pub warm_up_s: u64,
    /// Its phases are no shorter than this, in seconds; 0 is as short as all others.
    pub least_s: u64,
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id)
    }
}

/// All columns, in the order of the table.
pub const TOOLS: &[Tool] = &[
    // The budget is to be met two seconds after the load has begun. Windows are eight seconds apart, give or take one: a
    // shorter phase would hold none, and show a tool that costs nothing.
    Tool { id: "governed", title: "memleak", kind: Kind::Attach(&[]), warm_up_s: 2, least_s: 10 },
    Tool {
        id: "exact",
        title: "memleak, exact",
        kind: Kind::Attach(&["collector.budget=off"]),
        warm_up_s: 1,
        least_s: 0,
    },
    Tool {
        id: "sampled",
        title: "memleak, sampled",
        kind: Kind::Attach(&["collector.budget=off", "collector.sample_bytes=512KiB"]),
        warm_up_s: 1,
        least_s: 0,
    },
    Tool {
        id: "classic",
        title: "memleak, classic placement",
        kind: Kind::Attach(&["collector.budget=off", "collector.placement=entry"]),
        warm_up_s: 1,
        least_s: 0,
    },
    Tool {
        id: "heaptrack",
        title: "heaptrack (relaunch)",
        kind: Kind::Relaunch(&["heaptrack", "-o", "{}/heaptrack.out"]),
        warm_up_s: 1,
        least_s: 0,
    },
    Tool {
        id: "valgrind",
        title: "valgrind memcheck (relaunch)",
        kind: Kind::Relaunch(&["valgrind", "--tool=memcheck", "--quiet"]),
        warm_up_s: 1,
        least_s: 0,
    },
    Tool { id: "asan", title: "AddressSanitizer (rebuild)", kind: Kind::Rebuild, warm_up_s: 1, least_s: 0 },
];

/// True when a command of that name can be started.
pub fn is_installed(name: &str) -> bool {
    path_of(name).is_some()
}

/// Where a command lies; `None` when it is not installed.
pub fn path_of(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // What Debian installs comes first: wrappers around it are not what is measured. Servers are not in a user's PATH.
    ["/usr/bin".into(), "/usr/sbin".into()]
        .into_iter()
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    // Names are typed by people and read by programs.
    #[test]
    fn ids_are_distinct() {
        for (n, tool) in TOOLS.iter().enumerate() {
            assert!(TOOLS[..n].iter().all(|other| other.id != tool.id), "{tool}");
        }
    }

    // A tool that is missing is a note in the table, never a failed start.
    #[test]
    fn missing_commands_are_seen() {
        assert!(is_installed("sh"));
        assert!(!is_installed("no-such-command-anywhere"));
    }
}
