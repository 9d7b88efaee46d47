//! Unwind tables on disk, so that those of large programs are made once.
//!
//! One file per table, named after the hash of what the table was made from. Only files that belong to us and that
//! nobody else can write are believed; a file that does not add up is removed and made anew. The folder's size is
//! bounded: what was not used for the longest time goes first. Nothing here is needed for memleak to work: every
//! problem only means that a table is made again.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::SystemTime;

use memleak_probes::unwind::Row;
use sha2::{Digest, Sha256};

use super::table::Content;
use crate::cache_folder::{CacheFolder, is_ours};

/// First bytes of a file: name and version of the format.
const MAGIC: [u8; 16] = *b"memleak-unwind-1";
/// Bytes before the rows: magic, content, hash of the rows.
const HEAD: usize = 16 + 32 + 32;
/// Most bytes of all files.
const MAX_BYTES: u64 = 256 << 20;
/// Files of one table are not larger.
const MAX_FILE: u64 = 96 << 20;
/// How the names of our files end.
const SUFFIX: &str = ".unwind";

/// A folder with tables.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: CacheFolder,
}

impl Cache {
    /// The folder, which is made when the first table is stored.
    pub fn new(folder: PathBuf) -> Self {
        Cache { folder: CacheFolder { path: folder, suffix: SUFFIX, max_bytes: MAX_BYTES } }
    }

    /// A table that was stored before; `None` when there is none that can be believed.
    pub fn load(&self, content: &Content) -> Option<Vec<Row>> {
        let path = self.folder.file(&Self::name(content));
        self.folder.check().ok()?;
        let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path).ok()?;
        match read(file, content) {
            Ok(rows) => Some(rows),
            Err(e) => {
                tracing::debug!(path = %path.display(), "unwind table on disk not used: {e}");
                // Made anew; if it cannot be removed it will be replaced.
                let _ = fs::remove_file(&path);
                None
            }
        }
    }

    /// Stores a table: readers see all of it or nothing.
    ///
    /// # Errors
    /// The folder is not ours alone, or the disk refuses.
    pub fn store(&self, content: &Content, rows: &[Row]) -> io::Result<()> {
        let size = (HEAD + 8 * rows.len()) as u64;
        if size > MAX_FILE {
            return Ok(());
        }
        self.folder.prepare(size)?;
        let mut bytes = Vec::with_capacity(size as usize);
        bytes.extend(MAGIC);
        bytes.extend(content);
        bytes.extend([0; 32]);
        bytes.extend(rows.iter().flat_map(|row| row.to_le_bytes()));
        let hash: [u8; 32] = Sha256::digest(&bytes[HEAD..]).into();
        bytes[HEAD - 32..HEAD].copy_from_slice(&hash);
        let name = Self::name(content);
        let (path, draft) = (self.folder.file(&name), self.folder.draft(&name));
        let written = (self.folder.new_draft(&name))
            .and_then(|mut file| file.write_all(&bytes))
            .and_then(|()| fs::rename(&draft, &path));
        if written.is_err() {
            let _ = fs::remove_file(&draft);
        }
        written
    }

    fn name(content: &Content) -> String {
        content.iter().take(20).map(|b| format!("{b:02x}")).collect()
    }
}

fn read(file: File, content: &Content) -> io::Result<Vec<Row>> {
    let wrong = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()));
    let meta = file.metadata()?;
    if !meta.is_file() || !is_ours(&meta) {
        return wrong("it is not a file of ours alone");
    }
    if meta.len() > MAX_FILE || meta.len() < HEAD as u64 || !(meta.len() - HEAD as u64).is_multiple_of(8) {
        return wrong("its length is not that of a table");
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize);
    (&file).take(MAX_FILE).read_to_end(&mut bytes)?;
    let Some((head, rows)) = bytes.split_at_checked(HEAD) else { return wrong("it is cut off") };
    let hash: [u8; 32] = Sha256::digest(rows).into();
    if head[..16] != MAGIC || head[16..48] != content[..] || head[48..] != hash {
        return wrong("its contents do not add up");
    }
    // How recently it was used decides how long it stays; a disk that is mounted read-only may refuse.
    let _ = file.set_modified(SystemTime::now());
    let (rows, _) = rows.as_chunks::<8>();
    Ok(rows.iter().map(|row| Row::from_le_bytes(*row)).collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::time::Duration;

    use memleak_probes::unwind::Rule;

    use super::*;

    fn rows(n: u32) -> Vec<Row> {
        (0..n).map(|pc| Row::new(pc * 16, if pc % 2 == 0 { Rule::Signal } else { Rule::Outermost })).collect()
    }

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().join("deep/tables"));
        (dir, cache)
    }

    /// What is stored comes back, under its own name only, and only we can read it.
    #[test]
    fn a_stored_table_comes_back() {
        let (_dir, cache) = cache();
        assert_eq!(cache.load(&[1; 32]), None);
        cache.store(&[1; 32], &rows(1000)).unwrap();
        assert_eq!(cache.load(&[1; 32]), Some(rows(1000)));
        assert_eq!(cache.load(&[2; 32]), None);
        let meta = fs::metadata(cache.folder.file(&Cache::name(&[1; 32]))).unwrap();
        assert_eq!((meta.mode() & 0o777, meta.len()), (0o600, HEAD as u64 + 8000));
        assert_eq!(fs::metadata(&cache.folder.path).unwrap().mode() & 0o777, 0o700);
    }

    /// A damaged file is no table: it goes, and the next one is stored in its place.
    #[test]
    fn a_damaged_file_is_removed_and_made_anew() {
        let (_dir, cache) = cache();
        cache.store(&[1; 32], &rows(100)).unwrap();
        let path = cache.folder.file(&Cache::name(&[1; 32]));
        let whole = fs::read(&path).unwrap();
        for (at, len) in [(0, whole.len()), (20, whole.len()), (HEAD, whole.len()), (whole.len() - 1, whole.len())]
            .into_iter()
            .chain([(0, 0), (0, 10), (0, HEAD - 1), (0, whole.len() - 8), (0, whole.len() - 3)])
        {
            let mut bytes = whole.clone();
            bytes[at] ^= u8::from(len == whole.len());
            fs::write(&path, &bytes[..len]).unwrap();
            assert_eq!(cache.load(&[1; 32]), None, "byte {at}, length {len}");
            assert!(!path.exists());
        }
        cache.store(&[1; 32], &rows(100)).unwrap();
        assert_eq!(cache.load(&[1; 32]), Some(rows(100)));
    }

    /// Whoever could write a table could send every stack astray.
    #[test]
    fn what_others_can_write_is_not_believed() {
        let (_dir, cache) = cache();
        cache.store(&[1; 32], &rows(10)).unwrap();
        let path = cache.folder.file(&Cache::name(&[1; 32]));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o620)).unwrap();
        assert_eq!(cache.load(&[1; 32]), None);
        cache.store(&[1; 32], &rows(10)).unwrap();
        fs::set_permissions(&cache.folder.path, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(cache.load(&[1; 32]), None);
        let error = cache.store(&[3; 32], &rows(10)).unwrap_err();
        assert!(error.to_string().contains("can be written by others"), "{error}");
        fs::set_permissions(&cache.folder.path, fs::Permissions::from_mode(0o700)).unwrap();
        let elsewhere = cache.folder.path.join("elsewhere");
        fs::rename(&path, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        assert_eq!(cache.load(&[1; 32]), None, "a link is not followed");
    }

    /// The folder does not grow without end, and what is used stays.
    #[test]
    fn the_least_recently_used_table_goes_first() {
        let (_dir, mut cache) = cache();
        cache.folder.max_bytes = 3 * (HEAD as u64 + 800);
        for n in 1..=3_u8 {
            cache.store(&[n; 32], &rows(100)).unwrap();
            let file = File::options().write(true).open(cache.folder.file(&Cache::name(&[n; 32]))).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(u64::from(n))).unwrap();
        }
        assert!(cache.load(&[1; 32]).is_some());
        cache.store(&[4; 32], &rows(100)).unwrap();
        let there: Vec<u8> = (1..=4).filter(|n| cache.folder.file(&Cache::name(&[*n; 32])).exists()).collect();
        assert_eq!(there, [1, 3, 4]);
    }
}
