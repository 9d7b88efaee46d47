//! Where a run took place: figures mean nothing without it.

use std::fs;
use std::time::SystemTime;

use serde::Serialize;

/// The machine and the moment.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// Seconds since 1970.
    pub started_unix_s: u64,
    /// Version of memleak.
    pub memleak: String,
    /// Name and version of the distribution.
    pub system: String,
    /// Release of the kernel.
    pub kernel: String,
    /// Model name of the CPU.
    pub cpu: String,
    /// CPUs that may be used.
    pub cpus: usize,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Load average over a minute before the run: others that ran at the same time.
    pub load_before: f64,
    /// The same at the end, where the benchmark's own load is part of it.
    pub load_after: f64,
}

impl Machine {
    /// This one, now. What cannot be read is empty or zero.
    pub fn here(memleak: String) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let memory = value_of(&read("/proc/meminfo"), "MemTotal", ':');
        Machine {
            started_unix_s: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            memleak,
            system: value_of(&read("/etc/os-release"), "PRETTY_NAME", '=').trim_matches('"').to_owned(),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: value_of(&read("/proc/cpuinfo"), "model name", ':'),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: memory.trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024,
            load_before: load_average(),
            load_after: 0.0,
        }
    }

    /// Notes the load at the end.
    pub fn finish(&mut self) {
        self.load_after = load_average();
    }
}

/// The value of the first line `KEY SEPARATOR VALUE`; empty when there is none.
fn value_of(text: &str, key: &str, separator: char) -> String {
    text.lines()
        .filter_map(|line| line.split_once(separator))
        .find(|(name, _)| name.trim() == key)
        .map_or_else(String::new, |(_, value)| value.trim().to_owned())
}

fn load_average() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    // A run that does not say where it took place cannot be compared to anything.
    #[test]
    fn the_machine_is_known() {
        let machine = Machine::here("memleak 1".to_owned());
        assert!(machine.cpus > 0 && machine.memory_bytes > 1 << 20, "{machine:?}");
        assert!(!machine.kernel.is_empty() && !machine.system.is_empty(), "{machine:?}");
    }

    // The same shape in three files of the kernel and the distribution.
    #[test]
    fn values_are_found_by_their_keys() {
        assert_eq!(value_of("a\t: 1\nmodel name\t: X: Y\n", "model name", ':'), "X: Y");
        assert_eq!(value_of("a: 1\n", "b", ':'), "");
    }
}
