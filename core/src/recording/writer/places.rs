//! What is stored once and then only referred to: processes, sites, stacks, modules, and the names of frames.

use std::sync::Arc;

use rusqlite::{OptionalExtension, params};

use super::{Known, Writer, json};
use crate::Result;
use crate::recording::Location;
use crate::recording::codec::{put, put_delta};
use crate::snapshot::Site;
use crate::symbolize::Frame;

impl Writer {
    pub(super) fn store_process(&mut self, process: &crate::snapshot::Process) -> Result<()> {
        let crate::snapshot::Process { instance, pid, start_ticks, comm, exe, cmdline, labels } = process;
        self.run_sql(
            "INSERT OR IGNORE INTO processes (instance, host, pid, start_ticks, comm, exe, cmdline, labels) \
             VALUES (?, 1, ?, ?, ?, ?, ?, ?)",
            params![instance, pid, start_ticks.cast_signed(), comm, exe, cmdline, json(labels)?],
        )
        .map(drop)
    }

    /// Number of a site, which is stored if it is new.
    pub(super) fn site(
        &mut self,
        site: &Arc<Site>,
        number: u64,
        locate: &mut dyn FnMut(&Site) -> Vec<Location>,
    ) -> Result<u32> {
        if let Some(known) = self.sites.get_mut(&site.key) {
            known.seen = number;
            return Ok(known.id);
        }
        if self.processes.insert(site.process.instance) {
            self.store_process(&site.process)?;
        }
        // A site of a process that was lost from sight for some snapshots.
        let old = self
            .file
            .db
            .prepare_cached(
                "SELECT id, stack FROM sites WHERE instance = ? AND probe_set_number = ? AND stack_hash = ?",
            )
            .and_then(|mut q| {
                q.query_row(params![site.key.instance, site.key.probe_set, site.key.stack.cast_signed()], |r| {
                    Ok((r.get::<_, u32>(0)?, r.get::<_, i64>(1)?))
                })
                .optional()
            })
            .map_err(|e| self.failed(e))?;
        let (id, stack) = match old {
            Some(found) => found,
            None => self.new_site(site, &locate(site))?,
        };
        self.sites.insert(site.key, Known { id, stack, named: false, seen: number });
        Ok(id)
    }

    fn new_site(&mut self, site: &Site, locations: &[Location]) -> Result<(u32, i64)> {
        let stack = self.stack(locations)?;
        let id = self.next_site;
        self.next_site += 1;
        let mut addresses = Vec::new();
        let mut before = 0;
        for address in &site.addresses {
            put_delta(&mut addresses, before, *address);
            before = *address;
        }
        self.run_sql(
            "INSERT INTO sites (id, site_id, instance, probe_set_number, stack_hash, probe_set, function, stack, \
             addresses, truncated, first_tid, first_thread) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            params![
                id,
                site.id.cast_signed(),
                site.key.instance,
                site.key.probe_set,
                site.key.stack.cast_signed(),
                &*site.probe_set,
                &*site.function,
                stack,
                addresses,
                site.truncated.as_deref(),
                site.first_thread.as_ref().map(|t| t.tid),
                site.first_thread.as_ref().map(|t| &*t.name)
            ],
        )?;
        Ok((id, stack))
    }

    /// Row of a stack. One whose places all have names is shared by all processes, the names of its functions included.
    fn stack(&mut self, locations: &[Location]) -> Result<i64> {
        let mut blob = Vec::new();
        for location in locations {
            let module = match (&location.module, &location.build_id) {
                (None, None) => 0,
                _ => self.module(&location.module, &location.build_id)?,
            };
            put(&mut blob, module.unsigned_abs());
            put(&mut blob, location.offset);
        }
        let shared = !locations.is_empty() && locations.iter().all(|l| l.module.is_some());
        if shared && let Some(id) = self.caches.stacks.get(&blob) {
            return Ok(*id);
        }
        let id = self.run_sql("INSERT INTO stacks (locations) VALUES (?)", params![blob])?;
        if shared {
            self.caches.stacks.insert(blob, id);
        }
        Ok(id)
    }

    fn module(&mut self, path: &Option<String>, build_id: &Option<String>) -> Result<i64> {
        let key = (path.clone(), build_id.clone());
        if let Some(id) = self.caches.modules.get(&key) {
            return Ok(*id);
        }
        let id = self.run_sql("INSERT INTO modules (path, build_id) VALUES (?, ?)", params![path, build_id])?;
        self.caches.modules.insert(key, id);
        Ok(id)
    }

    /// Stores the names of a site's stack once they are known.
    pub(super) fn store_names(&mut self, site: &Site) -> Result<()> {
        let (Some(frames), Some(known)) = (site.frames.get(), self.sites.get(&site.key)) else { return Ok(()) };
        if known.named {
            return Ok(());
        }
        let stack = known.stack;
        if self.caches.named_stacks.insert(stack) {
            let mut blob = Vec::new();
            for frame in frames {
                put(&mut blob, self.frame(frame)?.unsigned_abs());
                // Which of the site's addresses, counted from 1; or another one.
                match site.addresses.iter().position(|a| *a == frame.address) {
                    Some(place) => put(&mut blob, place as u64 + 1),
                    None => {
                        put(&mut blob, 0);
                        put(&mut blob, frame.address);
                    }
                }
            }
            self.run_sql("UPDATE stacks SET frames = ? WHERE id = ?", params![blob, stack])?;
        }
        if let Some(known) = self.sites.get_mut(&site.key) {
            known.named = true;
        }
        Ok(())
    }

    fn frame(&mut self, frame: &Frame) -> Result<i64> {
        let key = Frame { address: 0, ..frame.clone() };
        if let Some(id) = self.caches.frames.get(&key) {
            return Ok(*id);
        }
        let module = match (&frame.module, &frame.build_id) {
            (None, None) => None,
            (path, build_id) => Some(self.module(path, build_id)?),
        };
        let Frame { function, module: _, offset, file, line, inlined, reason, address: _, build_id: _, file_address } =
            frame;
        let id = self.run_sql(
            "INSERT INTO frames (module, function, offset, file, line, inlined, reason, file_address) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            params![
                module,
                function,
                offset.cast_signed(),
                file,
                line,
                inlined,
                reason,
                file_address.map(u64::cast_signed)
            ],
        )?;
        self.caches.frames.insert(key, id);
        Ok(id)
    }
}
