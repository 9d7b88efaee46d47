//! Debug information from debuginfod servers, when the user's environment names some (`DEBUGINFOD_URLS`); off otherwise.
//!
//! Files are fetched by a thread of its own, one after the other, into a folder that is bounded; each is bounded in size and
//! time, and a file of another build is refused. Whoever asks waits a moment only: what comes later is used for later
//! questions. Source: debuginfod(8), `GET /buildid/BUILDID/debuginfo`.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crate::cache_folder::CacheFolder;
use crate::maps::elf::ElfInfo;
use crate::output::text::visible;

/// Most bytes of all files that are kept.
const MAX_FOLDER: u64 = 2 << 30;
/// Most bytes of one file unless the environment says less.
const MAX_BYTES: u64 = 512 << 20;
/// Most time for one file unless the environment says otherwise.
const MAX_TIME: Duration = Duration::from_secs(60);
/// By then a server must have been reached.
const CONNECT: Duration = Duration::from_secs(5);
/// A server that could not be reached so many times in a row is not asked again.
const MAX_FAILURES: u32 = 2;
/// How long the collector waits for files in all.
const PATIENCE: Duration = Duration::from_secs(3);

/// Which servers, and within which bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Addresses, asked in this order.
    pub servers: Vec<String>,
    /// Folder that files are kept in.
    pub folder: PathBuf,
    /// Most bytes of one file.
    pub max_bytes: u64,
    /// Most time for one file.
    pub max_time: Duration,
    /// How long all questions together wait for files.
    pub patience: Duration,
}

impl Settings {
    /// What the environment says, as debuginfod's own client reads it; `None` when it names no server.
    pub fn from_environment() -> Option<Settings> {
        Settings::from(|name| std::env::var(name).ok())
    }

    fn from(variable: impl Fn(&str) -> Option<String>) -> Option<Settings> {
        let urls = variable("DEBUGINFOD_URLS")?;
        // Other words say how signatures are checked.
        let is_url = |word: &&str| word.starts_with("http://") || word.starts_with("https://");
        let servers: Vec<String> =
            urls.split_whitespace().filter(is_url).map(|url| url.trim_end_matches('/').to_owned()).collect();
        let number = |name: &str| variable(name)?.trim().parse::<u64>().ok().filter(|n| *n > 0);
        let own = || CacheFolder::default_path().map(|path| path.join("debuginfod"));
        let folder =
            variable("DEBUGINFOD_CACHE_PATH").filter(|p| p.starts_with('/')).map(PathBuf::from).or_else(own)?;
        (!servers.is_empty()).then(|| Settings {
            servers,
            folder,
            max_bytes: number("DEBUGINFOD_MAXSIZE").unwrap_or(MAX_BYTES).min(MAX_BYTES),
            max_time: number("DEBUGINFOD_MAXTIME").map_or(MAX_TIME, Duration::from_secs),
            patience: PATIENCE,
        })
    }
}

/// What is known of a file.
#[derive(Debug)]
enum Known {
    Pending,
    /// Until somebody takes it: open files are few.
    Found(File),
    Missing,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Debuginfod {
    jobs: Sender<String>,
    done: Receiver<(String, Option<File>)>,
    known: HashMap<String, Known>,
    patience: Duration,
}

impl Debuginfod {
    /// Starts the thread; without it there is no debug information, and a warning.
    pub(super) fn start(settings: &Settings) -> Option<Debuginfod> {
        let (jobs, todo) = mpsc::channel::<String>();
        let (sender, done) = mpsc::channel();
        let mut client = Client::new(settings);
        let started = thread::Builder::new().name("debuginfod".into()).spawn(move || {
            for build_id in todo {
                let found = client.find(&build_id);
                if sender.send((build_id, found)).is_err() {
                    break;
                }
            }
        });
        match started {
            Ok(_) => Some(Debuginfod { jobs, done, known: HashMap::new(), patience: settings.patience }),
            Err(e) => {
                tracing::warn!("debuginfod servers are not asked: {e}");
                None
            }
        }
    }

    /// The file with the debug information of a build; `None` when there is none, or not yet. It is handed out once: the
    /// next who asks gets it from the folder anew.
    pub(super) fn get(&mut self, build_id: &str) -> Option<File> {
        // It becomes part of a path and of an address, and comes from the target.
        if build_id.len() < 8 || !build_id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        if !self.known.contains_key(build_id) {
            let sent = self.jobs.send(build_id.to_owned());
            self.known.insert(build_id.to_owned(), if sent.is_ok() { Known::Pending } else { Known::Missing });
        }
        let start = Instant::now();
        while self.is_pending(build_id) {
            let Some(left) = self.patience.checked_sub(start.elapsed()) else { break };
            match self.done.recv_timeout(left) {
                Ok(done) => self.take(done),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        self.patience = self.patience.saturating_sub(start.elapsed());
        if !matches!(self.known.get(build_id), Some(Known::Found(_))) {
            return None;
        }
        match self.known.remove(build_id) {
            Some(Known::Found(file)) => Some(file),
            _ => None,
        }
    }

    /// True while the file of a build is being fetched.
    pub(super) fn is_pending(&mut self, build_id: &str) -> bool {
        while let Ok(done) = self.done.try_recv() {
            self.take(done);
        }
        matches!(self.known.get(build_id), Some(Known::Pending))
    }

    fn take(&mut self, (build_id, found): (String, Option<File>)) {
        self.known.insert(build_id, found.map_or(Known::Missing, Known::Found));
    }
}

/// The thread's side.
struct Client {
    agent: ureq::Agent,
    /// With failures in a row.
    servers: Vec<(String, u32)>,
    folder: CacheFolder,
    max_bytes: u64,
}

impl Client {
    fn new(settings: &Settings) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT.min(settings.max_time)))
            .timeout_global(Some(settings.max_time))
            .max_redirects(3)
            .user_agent(concat!("memleak/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        let folder = CacheFolder { path: settings.folder.clone(), suffix: ".debug", max_bytes: MAX_FOLDER };
        let servers = settings.servers.iter().map(|url| (url.clone(), 0)).collect();
        Client { agent, servers, folder, max_bytes: settings.max_bytes }
    }

    /// The file, from the folder or from a server.
    fn find(&mut self, build_id: &str) -> Option<File> {
        if let Some(file) = self.kept(build_id) {
            return Some(file);
        }
        for n in 0..self.servers.len() {
            let Some((url, failures)) = self.servers.get(n).filter(|(_, failures)| *failures < MAX_FAILURES) else {
                continue;
            };
            let (url, failures) = (url.clone(), *failures);
            let what = format!("{}/buildid/{build_id}/debuginfo", visible(&url));
            let result = self.fetch(&url, build_id);
            let failed = matches!(result, Err(Refusal::Unreachable(_)));
            self.servers[n].1 = if failed { failures + 1 } else { 0 };
            match result {
                Ok(found @ Some(_)) => return found,
                Ok(None) => tracing::debug!("{what}: not there"),
                Err(Refusal::Unreachable(why) | Refusal::Unusable(why)) => {
                    tracing::warn!("debug information is not used: {what}: {}", visible(&why));
                    if failures + 1 == MAX_FAILURES && failed {
                        tracing::warn!("{} is not asked any more", visible(&url));
                    }
                }
            }
        }
        None
    }

    /// A file that was fetched before. It is checked again: it is cheap, and the disk is not always what it was.
    fn kept(&self, build_id: &str) -> Option<File> {
        self.folder.check().ok()?;
        let path = self.folder.file(build_id);
        let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path).ok()?;
        if !file.metadata().ok()?.is_file() || belongs(&file, build_id).is_err() {
            let _ = fs::remove_file(&path);
            return None;
        }
        // How recently it was used decides how long it stays; a disk that is mounted read-only may refuse.
        let _ = file.set_modified(SystemTime::now());
        Some(file)
    }

    fn fetch(&self, url: &str, build_id: &str) -> Result<Option<File>, Refusal> {
        let mut response = self
            .agent
            .get(format!("{url}/buildid/{build_id}/debuginfo"))
            .call()
            .map_err(|e| Refusal::Unreachable(e.to_string()))?;
        match response.status().as_u16() {
            200 => {}
            404 => return Ok(None),
            status => return Err(Refusal::Unreachable(format!("the answer was {status}"))),
        }
        let too_large = || Refusal::Unusable(format!("it is larger than {} MiB", self.max_bytes >> 20));
        if response.body().content_length().is_some_and(|length| length > self.max_bytes) {
            return Err(too_large());
        }
        let disk =
            |e: io::Error| Refusal::Unusable(format!("it cannot be kept in {}: {e}", self.folder.path.display()));
        self.folder.prepare(response.body().content_length().unwrap_or(self.max_bytes)).map_err(disk)?;
        let draft = self.folder.draft(build_id);
        let mut file = self.folder.new_draft(build_id).map_err(disk)?;
        let fetched = (|| {
            let mut body = response.body_mut().as_reader().take(self.max_bytes + 1);
            let length = io::copy(&mut body, &mut file).map_err(|e| Refusal::Unreachable(e.to_string()))?;
            if length > self.max_bytes {
                return Err(too_large());
            }
            belongs(&file, build_id).map_err(Refusal::Unusable)?;
            fs::rename(&draft, self.folder.file(build_id)).map_err(disk)
        })();
        match fetched {
            Ok(()) => Ok(Some(file)),
            Err(why) => {
                let _ = fs::remove_file(&draft);
                Err(why)
            }
        }
    }
}

/// Why a file is not used.
enum Refusal {
    /// The server did not answer, or not in time.
    Unreachable(String),
    /// What it sent.
    Unusable(String),
}

/// Whether a file is of the build that was asked for; its names would be wrong ones otherwise.
fn belongs(file: &File, wanted: &str) -> Result<(), String> {
    match ElfInfo::read(file) {
        Ok(ElfInfo { build_id: Some(id), .. }) if id == wanted => Ok(()),
        Ok(ElfInfo { build_id: Some(id), .. }) => Err(format!("it belongs to another build ({id})")),
        Ok(_) => Err("it has no build id".to_owned()),
        Err(e) => Err(format!("{e:#}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing is asked of anybody unless the user has named servers.
    #[test]
    fn it_is_off_unless_the_environment_names_servers() {
        assert_eq!(Settings::from(|_| None), None);
        let only = |urls: &'static str| Settings::from(move |n| (n == "DEBUGINFOD_URLS").then(|| urls.to_owned()));
        assert_eq!(only(""), None);
        assert_eq!(only("ima:enforcing file:///etc"), None);
        assert_eq!(only("https://a.example/ ima:ignore http://b").unwrap().servers, ["https://a.example", "http://b"]);
    }

    /// The variables of debuginfod's client bound ours, and cannot lift the bounds.
    #[test]
    fn bounds_come_from_the_environment() {
        let with = |size: &'static str| {
            Settings::from(move |name| {
                let value = match name {
                    "DEBUGINFOD_URLS" => "http://127.0.0.1:1",
                    "DEBUGINFOD_CACHE_PATH" => "/tmp/somewhere",
                    "DEBUGINFOD_MAXTIME" => "7",
                    "DEBUGINFOD_MAXSIZE" => size,
                    _ => return None,
                };
                Some(value.to_owned())
            })
            .unwrap()
        };
        assert_eq!((with("1000").max_bytes, with("1000").max_time), (1000, Duration::from_secs(7)));
        assert_eq!(with("99999999999999").max_bytes, MAX_BYTES);
        assert_eq!((with("x").max_bytes, with("0").max_bytes), (MAX_BYTES, MAX_BYTES));
        assert_eq!(with("1").folder, PathBuf::from("/tmp/somewhere"));
    }

    /// A build id is the target's text, and becomes part of a path and of an address.
    #[test]
    fn a_build_id_that_is_none_is_not_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            servers: vec!["http://127.0.0.1:1".into()],
            folder: folder.path().join("deep"),
            max_bytes: 1,
            max_time: Duration::from_secs(1),
            patience: Duration::from_secs(1),
        };
        let mut client = Debuginfod::start(&settings).unwrap();
        for id in ["", "ab", "../../../../etc/passwd", "abcdefgh", "abcd 1234"] {
            assert!(client.get(id).is_none());
        }
        assert!(client.known.is_empty());
    }
}
