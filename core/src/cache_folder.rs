//! A folder of ours on disk, bounded in size, for what can be made or fetched again.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// How names of files that are being written end; the process writes them under another name first.
const DRAFT: &str = ".draft";

/// A folder with files that only we can write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CacheFolder {
    pub(crate) path: PathBuf,
    /// How the names of its files end.
    pub(crate) suffix: &'static str,
    /// Most bytes of all files.
    pub(crate) max_bytes: u64,
}

impl CacheFolder {
    /// Where caches are kept unless the settings say otherwise: `/var/cache/memleak` for root, else below the user's
    /// cache folder. `None` when there is no such place.
    pub(crate) fn default_path() -> Option<PathBuf> {
        // SAFETY: the call has no preconditions.
        if unsafe { libc::geteuid() } == 0 {
            return Some(PathBuf::from("/var/cache/memleak"));
        }
        let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
        let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")).filter(|p| p.is_absolute());
        base.or_else(home).map(|base| base.join("memleak"))
    }

    /// Path of the file of a name.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}{}", self.suffix))
    }

    /// Path under which a file is written before it is renamed.
    pub(crate) fn draft(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.{}{DRAFT}", std::process::id()))
    }

    /// Makes the folder if need be, and room for `size` more bytes.
    ///
    /// # Errors
    /// It is not ours alone, or the disk refuses.
    pub(crate) fn prepare(&self, size: u64) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.path)?;
        self.check()?;
        self.make_room(size)
    }

    /// Refuses a folder in which others could place files.
    pub(crate) fn check(&self) -> io::Result<()> {
        let meta = fs::metadata(&self.path)?;
        if !meta.is_dir() || !is_ours(&meta) {
            let why = format!("{} can be written by others", self.path.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        Ok(())
    }

    /// Removes the files that were not used for the longest time until `size` more bytes have room.
    fn make_room(&self, size: u64) -> io::Result<()> {
        let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&self.path)?.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // Drafts of runs that were killed count, and go, too.
            if meta.is_file() && (name.ends_with(self.suffix) || name.ends_with(DRAFT)) {
                files.push((meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), meta.len(), entry.path()));
            }
        }
        files.sort();
        let mut total: u64 = files.iter().map(|(_, len, _)| len).sum();
        for (_, len, path) in files {
            if total.saturating_add(size) <= self.max_bytes {
                break;
            }
            fs::remove_file(path)?;
            total -= len;
        }
        Ok(())
    }
}

/// True when nobody but us can change it.
pub(crate) fn is_ours(meta: &fs::Metadata) -> bool {
    // SAFETY: the call has no preconditions.
    meta.uid() == unsafe { libc::geteuid() } && meta.mode() & 0o022 == 0
}
