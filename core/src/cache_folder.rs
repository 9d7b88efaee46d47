//! A folder of ours on disk, bounded in size, for what can be made or fetched again.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
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

    /// Makes the file that [`CacheFolder::draft`] names, for us alone, in place of one that a killed run of this process id has
    /// left.
    ///
    /// # Errors
    /// The disk refuses.
    pub(crate) fn new_draft(&self, name: &str) -> io::Result<File> {
        let draft = self.draft(name);
        match fs::remove_file(&draft) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(draft)
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
            match fs::remove_file(path) {
                // Another run was faster.
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => total -= len,
            }
        }
        Ok(())
    }
}

/// True when nobody but us can change it.
pub(crate) fn is_ours(meta: &fs::Metadata) -> bool {
    // SAFETY: the call has no preconditions.
    meta.uid() == unsafe { libc::geteuid() } && meta.mode() & 0o022 == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Process ids come again, in containers above all: a draft of a killed run must not block a file for ever.
    #[test]
    fn a_draft_that_was_left_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let folder = CacheFolder { path: dir.path().to_owned(), suffix: ".x", max_bytes: 1 };
        fs::write(folder.draft("a"), "left").unwrap();
        assert_eq!(folder.new_draft("a").unwrap().metadata().unwrap().len(), 0);
        // Nor is anything written where a link leads.
        let aim = dir.path().join("aim");
        fs::write(&aim, "kept").unwrap();
        std::os::unix::fs::symlink(&aim, folder.draft("b")).unwrap();
        assert_eq!(folder.new_draft("b").unwrap().metadata().unwrap().len(), 0);
        assert_eq!(fs::read(&aim).unwrap(), b"kept");
    }
}
