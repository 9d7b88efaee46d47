//! Writes sample reports from a synthetic run, to look at the templates without tracing anything:
//!
//! ```text
//! cargo run -p memleak --example sample_report -- OUT.html [SITES SNAPSHOTS]
//! ```
//!
//! Without numbers the run is a small realistic one (a leak, a cache, churn, hostile names) and the text report goes
//! to standard output; with numbers it has that many sites and snapshots.

mod synthetic;

use std::error::Error;
use std::path::PathBuf;

use memleak_core::output::atomic;
use memleak_core::output::report::Report;
use memleak_core::output::templates::Templates;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (path, run) = match args.as_slice() {
        [path] => (PathBuf::from(path), synthetic::realistic()),
        [path, sites, snapshots] => (PathBuf::from(path), synthetic::large(sites.parse()?, snapshots.parse()?)),
        _ => return Err("usage: sample_report OUT.html [SITES SNAPSHOTS]".into()),
    };
    let templates = Templates::new(None)?;
    let report = Report::new(&run.history, &run.alerts, &run.info, 2_000);
    atomic::write(&path, report.html(&templates)?.as_bytes())?;
    if args.len() == 1 {
        print!("{}", report.text(&templates)?);
    }
    Ok(())
}
