//! redis from its Debian package, which allocates with jemalloc, under `redis-benchmark`.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Done, Launch, SLACK, Server, Target, Workload, free_port, helpers_of, missing_command};
use crate::process::output_of;
use crate::tools::path_of;

/// Connections, as `redis-benchmark` has by default.
const CLIENTS: &str = "50";
/// Keys that are written and read; few enough to fill them quickly under the slowest tool.
const KEYS: &str = "10000";
/// Bytes of a value.
const VALUE: &str = "100";
/// Requests that find out how many fill a phase.
const PILOT: u64 = 5_000;

/// One kind of request.
pub struct Redis {
    id: &'static str,
    title: &'static str,
    /// As `redis-benchmark -t` calls it.
    request: &'static str,
}

pub const SET: Redis = Redis { id: "redis-set", title: "redis SET, 50 connections, values of 100 B", request: "set" };
pub const GET: Redis = Redis { id: "redis-get", title: "redis GET, 50 connections, values of 100 B", request: "get" };

impl Workload for Redis {
    fn id(&self) -> &'static str {
        self.id
    }

    fn title(&self) -> &'static str {
        self.title
    }

    fn unit(&self) -> &'static str {
        "requests"
    }

    fn missing(&self) -> Option<String> {
        missing_command(&["redis-server", "redis-benchmark"])
    }

    fn start(&self, launch: &Launch, folder: &Path) -> Result<Box<dyn Target>> {
        // A link to redis-check-rdb and others too: what is executed is what the link leads to.
        let program = path_of("redis-server").context("redis-server is not installed")?;
        let port = free_port()?;
        let mut command = launch.command(&program);
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        let server = Server::start(command, launch, &program, port, folder)?;
        let target = Loaded { server, request: self.request, folder: folder.to_owned() };
        // All keys are there from the start, or the first phase would be the only one in which memory grows.
        target.run("set", 20_000, SLACK)?;
        Ok(Box::new(target))
    }
}

/// A running server.
struct Loaded {
    server: Server,
    request: &'static str,
    folder: std::path::PathBuf,
}

impl Loaded {
    fn run(&self, request: &str, count: u64, limit: Duration) -> Result<Done> {
        let mut command = Command::new(path_of("redis-benchmark").context("redis-benchmark is not installed")?);
        command
            .args(["-h", "127.0.0.1", "-p", &self.server.port.to_string(), "-t", request, "-n", &count.to_string()])
            .args(["-c", CLIENTS, "-r", KEYS, "-d", VALUE, "--csv"]);
        let output = output_of(&mut command, limit, &self.folder)?;
        parse_csv(&output, count).with_context(|| format!("failed to read the output of redis-benchmark: {output}"))
    }
}

impl Target for Loaded {
    fn pid(&self) -> u32 {
        self.server.worker
    }

    fn helpers(&self) -> Vec<u32> {
        helpers_of(&self.server.running, self.server.worker)
    }

    fn load(&mut self, seconds: u64) -> Result<Done> {
        // It takes a number of requests, not a time.
        let pilot = self.run(self.request, PILOT, SLACK)?;
        let count = (pilot.units / pilot.elapsed_s * seconds as f64).max(1_000.0);
        let done = self.run(self.request, count as u64, Duration::from_secs(seconds) + SLACK)?;
        // The server's clock counts both, so the work must, too. The latency is that of the longer part.
        Ok(Done { units: pilot.units + done.units, elapsed_s: pilot.elapsed_s + done.elapsed_s, ..done })
    }

    fn stop(&mut self) {
        self.server.stop();
    }
}

/// Reads what `redis-benchmark --csv` printed for one kind of request; `None` when that is not what it is.
fn parse_csv(text: &str, count: u64) -> Option<Done> {
    let mut rows = text.lines().filter(|line| line.starts_with('"')).map(split_row);
    let header = rows.next()?;
    let row = rows.next()?;
    let field = |name: &str| row.get(header.iter().position(|title| title == name)?)?.parse::<f64>().ok();
    let rate = field("rps").filter(|&rate| rate > 0.0)?;
    Some(Done { units: count as f64, elapsed_s: count as f64 / rate, p99_ms: field("p99_latency_ms") })
}

fn split_row(line: &str) -> Vec<String> {
    line.split(',').map(|field| field.trim_matches('"').to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Columns are found by their titles: versions of redis-benchmark differ in which they have.
    #[test]
    fn rate_and_latency_are_read_from_csv() {
        let text = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\"p95_latency_ms\",\
                    \"p99_latency_ms\",\"max_latency_ms\"\n\
                    \"SET\",\"50000.00\",\"0.391\",\"0.120\",\"0.375\",\"0.607\",\"0.887\",\"1.503\"\n";
        assert_eq!(parse_csv(text, 100_000), Some(Done { units: 100_000.0, elapsed_s: 2.0, p99_ms: Some(0.887) }));
        assert_eq!(parse_csv("Could not connect to Redis\n", 100_000), None);
    }
}
