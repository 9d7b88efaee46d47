//! nginx from its Debian package, serving one compressed page, under `wrk`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Done, Launch, SLACK, Server, Target, Workload, free_port, helpers_of, missing_command};
use crate::process::output_of;
use crate::tools::path_of;

/// Requests for a page.
pub struct Nginx;

impl Workload for Nginx {
    fn id(&self) -> &'static str {
        "nginx"
    }

    fn title(&self) -> &'static str {
        "nginx, a compressed page of 5 kB, 16 connections"
    }

    fn unit(&self) -> &'static str {
        "requests"
    }

    fn missing(&self) -> Option<String> {
        missing_command(&["nginx", "wrk"])
    }

    fn start(&self, launch: &Launch, folder: &Path) -> Result<Box<dyn Target>> {
        let program = path_of("nginx").context("nginx is not installed")?;
        let port = free_port()?;
        let config = write_config(folder, port)?;
        let mut command = launch.command(&program);
        command.arg("-p").arg(folder).arg("-c").arg(config);
        let server = Server::start(command, launch, &program, port, folder)?;
        Ok(Box::new(Loaded { server, folder: folder.to_owned() }))
    }
}

/// A running server.
struct Loaded {
    server: Server,
    folder: PathBuf,
}

impl Target for Loaded {
    fn pid(&self) -> u32 {
        self.server.worker
    }

    fn helpers(&self) -> Vec<u32> {
        helpers_of(&self.server.running, self.server.worker)
    }

    fn load(&mut self, seconds: u64) -> Result<Done> {
        let mut command = Command::new(path_of("wrk").context("wrk is not installed")?);
        command.args(["-t", "1", "-c", "16", "-d", &format!("{seconds}s"), "--latency", "--timeout", "30s"]).args([
            "-H",
            "Accept-Encoding: gzip",
            &format!("http://127.0.0.1:{}/", self.server.port),
        ]);
        let output = output_of(&mut command, Duration::from_secs(seconds) + SLACK, &self.folder)?;
        parse_wrk(&output).with_context(|| format!("failed to read the output of wrk: {output}"))
    }

    fn stop(&mut self) {
        self.server.stop();
    }
}

/// Reads what `wrk --latency` printed; `None` when that is not what it is, or when not every answer was the page.
fn parse_wrk(text: &str) -> Option<Done> {
    if text.contains("Non-2xx or 3xx responses") {
        return None;
    }
    let line = |prefix: &str| text.lines().find_map(|line| line.trim_start().strip_prefix(prefix));
    // "  1234 requests in 2.00s, 1.00MB read"
    let mut total = text.lines().find(|line| line.contains(" requests in "))?.split_whitespace();
    let units = total.next()?.parse::<u64>().ok()? as f64;
    let elapsed_s = parse_time_ms(total.nth(2)?.trim_end_matches(','))? / 1e3;
    let p99_ms = parse_time_ms(line("99%")?.trim())?;
    Some(Done { units, elapsed_s, p99_ms: Some(p99_ms) })
}

/// Reads a time with its unit, such as `1.25ms`.
fn parse_time_ms(text: &str) -> Option<f64> {
    let at = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(at);
    let factor = match unit {
        "us" => 1e-3,
        "ms" => 1.0,
        "s" => 1e3,
        "m" => 60e3,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}

/// Writes a page and a configuration that touch nothing outside the folder.
fn write_config(folder: &Path, port: u16) -> Result<PathBuf> {
    let root = folder.display();
    // A page that neither compresses to nothing nor looks like noise.
    let page: String = (0..250_u32).map(|n| format!("line {:>5} of the page\n", n * 7919 % 10_007)).collect();
    std::fs::write(folder.join("index.html"), page).context("failed to write a page")?;
    // One process, so that there is one clock to read; it stays root where we are, to read the folder.
    let text = format!(
        "user root;\ndaemon off;\nmaster_process off;\npid {root}/nginx.pid;\nerror_log {root}/error.log;\n\
         events {{ worker_connections 256; }}\n\
         http {{\n  access_log off;\n  gzip on;\n  gzip_types text/html;\n  keepalive_requests 1000000;\n\
         client_body_temp_path {root}/body;\n  proxy_temp_path {root}/proxy;\n  fastcgi_temp_path {root}/fastcgi;\n\
         uwsgi_temp_path {root}/uwsgi;\n  scgi_temp_path {root}/scgi;\n\
         server {{ listen 127.0.0.1:{port}; root {root}; }}\n}}\n"
    );
    let path = folder.join("nginx.conf");
    std::fs::write(&path, text).context("failed to write a configuration")?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "Running 2s test @ http://127.0.0.1:8080/\n  1 threads and 16 connections\n  \
        Thread Stats   Avg      Stdev     Max   +/- Stdev\n    Latency     1.32ms  606.43us  15.56ms   96.28%\n    \
        Req/Sec    12.42k     1.31k   14.16k    70.00%\n  Latency Distribution\n     50%    1.20ms\n     75%    1.38ms\n     \
        90%    1.66ms\n     99%    3.42ms\n  24724 requests in 2.10s, 12.05MB read\nRequests/sec:  11773.33\n\
        Transfer/sec:      5.74MB\n";

    // wrk has no machine-readable output; its text is all there is.
    #[test]
    fn requests_time_and_latency_are_read() {
        assert_eq!(parse_wrk(OUTPUT), Some(Done { units: 24_724.0, elapsed_s: 2.1, p99_ms: Some(3.42) }));
        assert_eq!(parse_wrk("unable to connect\n"), None);
    }

    // A server that answers quickly with errors is not fast.
    #[test]
    fn errors_are_no_result() {
        assert_eq!(parse_wrk(&format!("{OUTPUT}  Non-2xx or 3xx responses: 17\n")), None);
    }

    // wrk chooses the unit.
    #[test]
    fn every_unit_of_time_is_known() {
        assert_eq!(parse_time_ms("606.50us"), Some(0.6065));
        assert_eq!(parse_time_ms("1.20s"), Some(1200.0));
        assert_eq!(parse_time_ms("1.50m"), Some(90_000.0));
        assert_eq!(parse_time_ms("3"), None);
    }
}
