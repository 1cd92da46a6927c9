"""Every defence of docs/attacks.md that can be switched off by an edit, and the tests that must fail without it.

`edits` are (file, text, text instead); a text must be there exactly once. An edit does what a writer would have done
who did not know of the attack: leaves a check out, or lets the kernel resolve a name.
"""

from __future__ import annotations

from dataclasses import dataclass

Edit = tuple[str, str, str]


@dataclass(frozen=True)
class Defence:
    """Without `edits`' originals, at least one of `tests` (FILE::NAME, from tests/) must fail."""

    what: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]

    @property
    def native(self) -> bool:
        """Whether the extension has to be built again."""
        return any(file.startswith("native/") for file, _, _ in self.edits)


UNPACK = "src/flatmount/store/unpack.py"
LAYER_TREE = "src/flatmount/store/layer_tree.py"
LAYER = "src/flatmount/image/layer.py"
MODEL = "src/flatmount/image/model.py"
SOURCE = "src/flatmount/image/source.py"
TAR = "src/flatmount/image/tar.py"
IMPORTING = "src/flatmount/store/importing.py"
STORE = "src/flatmount/store/store.py"
DISK = "src/flatmount/store/disk.py"
FETCH = "src/flatmount/image/registry_fetch.py"
PARTIAL = "src/flatmount/image/partial.py"
FRONT = "native/front/front.c"

HOSTILE = "kernel/test_unpack.py::test_a_hostile_entry_is_named_and_nothing_stays"
DAMAGED = "kernel/test_images.py::test_a_damaged_image_changes_nothing"
KILL = "kernel/test_kills.py::test_a_kill_loses_nothing_and_leaves_nothing_by_half"

# A link on the way is taken for a directory, and whatever it leads to is opened.
BY_THE_KERNEL: tuple[Edit, ...] = (
    (LAYER_TREE, "target = entry.target\n", "target = None\n"),
    (LAYER_TREE, "os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC", "os.O_RDONLY | os.O_DIRECTORY"),
)
LINKED = "self._tree.record(path, self._linked_below(found))"


def never(file: str, condition: str) -> tuple[Edit, ...]:
    """A check that is left out: `condition` stands for a whole `if ...:`."""
    indent = condition[: len(condition) - len(condition.lstrip())]
    return ((file, condition, f"{indent}if False:"),)


def never_c(condition: str) -> tuple[Edit, ...]:
    """The same in the front."""
    return ((FRONT, condition, "if (0)"),)


DEFENCES = (
    # Traversal.
    Defence("'..' in names", never(UNPACK, 'if b".." in parts:'), (f"{HOSTILE}[dotdot]",)),
    Defence(
        "empty names",
        (*never(UNPACK, "if not name:"), *never(UNPACK, "if entry.kind is not Kind.DIRECTORY:")),
        (f"{HOSTILE}[empty name]",),
    ),
    Defence(
        "names in the native code",
        (
            (
                "native/tree_file.c",
                'if (!*name || strchr(name, \'/\') || !strcmp(name, ".") || !strcmp(name, ".."))',
                "if (0)",
            ),
        ),
        ("kernel/test_tree.py::test_a_file_is_made_nowhere_else",),
    ),
    Defence(
        "PAX records without a space",
        (
            (TAR, "if space <= at:", "if False:"),
            (
                TAR,
                'end = at + self._decimal(data[at:space], "the length of a PAX record")',
                'end = at + (self._decimal(data[at:space], "the length of a PAX record") if space > at else 0)',
            ),
        ),
        ("unit/test_tar.py::test_what_is_no_archive_is_told",),
    ),
    Defence("NUL in names", never(UNPACK, 'if b"\\0" in name:'), (f"{HOSTILE}[NUL in a PAX name]",)),
    Defence(
        "long names",
        (
            *never(UNPACK, "if len(name) > self._limits.path_bytes:"),
            *never(LAYER_TREE, 'if len(path) > self._path_bytes or path.count(b"/") >= self._depth:'),
        ),
        (f"{HOSTILE}[name too long]",),
    ),
    Defence(
        "deep names",
        never(LAYER_TREE, 'if len(path) > self._path_bytes or path.count(b"/") >= self._depth:'),
        (f"{HOSTILE}[too deep]",),
    ),
    Defence(
        "absolute and dotted names",
        (
            (UNPACK, 'for part in name.split(b"/") if part and part != b"."]', 'for part in name.split(b"/")]'),
            *never(LAYER_TREE, 'if not part or part == b".":'),
        ),
        ("kernel/test_hostile.py::test_absolute_and_dotted_names_stay_inside",),
    ),
    # Symbolic links.
    Defence(
        "links on the way are resolved inside the image",
        BY_THE_KERNEL,
        ("kernel/test_unpack.py::test_links_out_of_the_image_lead_into_it",),
    ),
    Defence(
        "absolute links begin at the image's root",
        ((LAYER_TREE, 'here = b"" if target.startswith(b"/") else here', "here = here"),),
        ("kernel/test_hostile.py::test_an_absolute_link_begins_at_the_images_root",),
    ),
    Defence(
        "the root stays a directory",
        never(UNPACK, "if entry.kind is not Kind.DIRECTORY:"),
        (f"{HOSTILE}[root as a link]", f"{HOSTILE}[root as a file]"),
    ),
    Defence(
        "links without end",
        ((LAYER_TREE, "if links > _LINKS:", 'if links > _LINKS:\n                return b""\n            if False:'),),
        (f"{HOSTILE}[loop of links]", "kernel/test_hostile.py::test_a_chain_of_links_that_no_realpath_follows"),
    ),
    Defence(
        "a swapped component is looked up again",
        (
            *BY_THE_KERNEL,
            (
                LAYER_TREE,
                '        self._resolved = {b"": b""}\n        self._children[parent]',
                "        self._children[parent]",
            ),
        ),
        ("kernel/test_hostile.py::test_a_directory_that_becomes_a_link_on_the_way",),
    ),
    Defence(
        "links are never resolved as text",
        (
            (
                LAYER_TREE,
                '        asked = b"/".join(parts)\n',
                '        asked = b"/".join(parts)\n'
                "        if parts and self.entries.get(parts[0]) and self.entries[parts[0]].kind is Kind.SYMLINK:\n"
                '            real = os.path.realpath(b"/proc/self/fd/%d/%b" % (self._root_fd, asked))\n'
                "            self._fds[asked] = os.open(real, os.O_RDONLY | os.O_DIRECTORY)\n"
                "            self._children.setdefault(asked, set())\n"
                "            return asked\n",
            ),
        ),
        ("kernel/test_hostile.py::test_a_chain_of_links_that_no_realpath_follows",),
    ),
    # Hard links.
    Defence(
        "hard links are made inside",
        (
            (
                UNPACK,
                "        target_parent, target = self._link_target(entry)\n",
                '        root = b"/proc/self/fd/%d/" % self._tree._root_fd\n'
                "        os.link(root + entry.target, name, dst_dir_fd=self._tree.fd(parent))\n"
                "        return\n"
                "        target_parent, target = self._link_target(entry)\n",
            ),
        ),
        ("kernel/test_hostile.py::test_hard_links_do_not_leave_through_links",),
    ),
    Defence(
        "hard links lead to files that are there",
        (
            *never(UNPACK, "if not parts or any(part.startswith(_WHITEOUT) for part in parts):"),
            *never(UNPACK, "if found is None or found.is_directory:"),
        ),
        (f"{HOSTILE}[link to a whiteout]", f"{HOSTILE}[link to nothing]"),
    ),
    Defence(
        "a hard link to a link lends nothing",
        (
            (
                UNPACK,
                "            self._tree.record(path, source)\n            return\n",
                "            os.chmod(name, entry.mode, dir_fd=self._tree.fd(parent))\n"
                "            self._tree.record(path, source)\n            return\n",
            ),
        ),
        ("kernel/test_hostile.py::test_nothing_is_changed_through_a_hard_link_to_a_link",),
    ),
    Defence(
        "a hard link into a lower layer changes nothing there",
        ((UNPACK, LINKED, f"os.chmod(name, entry.mode, dir_fd=self._tree.fd(parent))\n        {LINKED}"),),
        ("kernel/test_hostile.py::test_the_victim_of_a_link_into_a_lower_layer_keeps_its_mode",),
    ),
    # Whiteouts.
    Defence(
        "whiteouts of no name",
        never(UNPACK, 'if name in (b"", b".", b".."):'),
        (f"{HOSTILE}[whiteout of nothing]", f"{HOSTILE}[whiteout of .]", f"{HOSTILE}[whiteout of ..]"),
    ),
    Defence(
        "nothing beneath a whiteout",
        never(UNPACK, "if any(part.startswith(_WHITEOUT) for part in parts[:-1]):"),
        (f"{HOSTILE}[beneath a whiteout]",),
    ),
    Defence(
        "a whiteout through a link stays inside",
        BY_THE_KERNEL,
        ("kernel/test_unpack.py::test_links_out_of_the_image_lead_into_it",),
    ),
    Defence(
        "an opaque marker before its directory's own entry counts",
        (
            (
                UNPACK,
                "_replace(opaque=old.opaque)\n                return",
                "_replace(opaque=False)\n                return",
            ),
        ),
        ("kernel/test_hostile.py::test_an_opaque_marker_before_its_directory_counts",),
    ),
    Defence(
        "an opaque marker hides what lies beneath",
        ((LAYER_TREE, "self.entries[path] = self.entries[path]._replace(opaque=True)", "pass"),),
        ("kernel/test_unpack.py::test_an_opaque_marker_works_wherever_it_comes",),
    ),
    Defence(
        "an opaque root",
        never(LAYER_TREE, "if self.root.opaque:"),
        ("kernel/test_unpack.py::test_an_opaque_root_hides_all_that_was",),
    ),
    Defence(
        "whiteouts beneath what is no directory",
        (
            (
                UNPACK,
                "        except NoDirectory:\n            return\n",
                "        except NoDirectory:\n            raise\n",
            ),
        ),
        ("kernel/test_unpack.py::test_whiteouts_beneath_a_directory_that_became_a_file",),
    ),
    # What means something to the kernel.
    Defence(
        "overlayfs's attributes",
        (("src/flatmount/store/attributes.py", '(b"trusted.overlay.", b"user.overlay.")', '(b"none.",)'),),
        ("kernel/test_hostile.py::test_no_attribute_of_overlayfs_comes_with_an_image",),
    ),
    Defence(
        "the host's labels",
        (("src/flatmount/store/attributes.py", 'b"security.selinux"', 'b"none"'),),
        ("kernel/test_hostile.py::test_no_attribute_of_overlayfs_comes_with_an_image",),
    ),
    Defence(
        "devices that pose as whiteouts",
        never(UNPACK, "if entry.kind is Kind.CHAR and device == (0, 0):"),
        (f"{HOSTILE}[posing as a whiteout]",),
    ),
    Defence(
        "device numbers",
        (
            *never(UNPACK, "if entry.major >= 1 << 12 or entry.minor >= 1 << 20:"),
            # The C library would refuse it; the kernel takes what fits.
            (UNPACK, "os.makedev(*device), dir_fd=fd)", "os.makedev(entry.major & 0xFFF, entry.minor), dir_fd=fd)"),
        ),
        (f"{HOSTILE}[no such device]",),
    ),
    Defence(
        "roots are nodev",
        (
            ("src/flatmount/strategies/parts.py", "= MountAttribute.NODEV\n", "= MountAttribute.NONE\n"),
            ("src/flatmount/strategies/usual.py", "MountFlag.NODEV", "MountFlag.NONE"),
        ),
        ("kernel/test_hostile.py::test_a_device_node_in_a_mounted_root_cannot_be_opened",),
    ),
    Defence(
        "setuid programs are out of reach",
        ((DISK, "        _make(os.path.join(base, name), 0o700)", "        _make(os.path.join(base, name), 0o755)"),),
        ("kernel/test_hostile.py::test_setuid_programs_are_out_of_reach_for_other_users",),
    ),
    Defence(
        "blobs are plain files",
        never("src/flatmount/image/files.py", "if not stat.S_ISREG(os.fstat(last).st_mode):"),
        (f"{DAMAGED}[a blob that is a fifo]",),
    ),
    # Documents.
    Defence(
        "digests are digests",
        (("src/flatmount/image/digest.py", "if not isinstance(text, str) or not _DIGEST.match(text):", "if False:"),),
        (f"{DAMAGED}[digest as a path]",),
    ),
    Defence(
        "sizes of documents",
        never(SOURCE, "if len(data) != descriptor.size:"),
        (f"{DAMAGED}[wrong size]",),
    ),
    Defence(
        "sizes of layers",
        (*never(SOURCE, "if size != descriptor.size:"), *never(LAYER, "if self._size != said.size:")),
        (f"{DAMAGED}[truncated]",),
    ),
    Defence(
        "digests of layers",
        (
            (LAYER, "        if digest != said.digest:", "        if False:"),
            (LAYER, "if self._plain.hexdigest() != digests.hexadecimal(self._diff_id):", "if False:"),
        ),
        (f"{DAMAGED}[tampered]", "kernel/test_pull.py::test_a_failure_leaves_the_store_as_it_was"),
    ),
    Defence(
        "diff_ids",
        never(LAYER, "if self._plain.hexdigest() != digests.hexadecimal(self._diff_id):"),
        (f"{DAMAGED}[wrong diff_id]",),
    ),
    Defence("images without layers", never(SOURCE, "if not manifest.layers:"), (f"{DAMAGED}[no layers]",)),
    Defence(
        "indexes of themselves",
        ((SOURCE, "if chosen.digest in seen or len(seen) == NESTING:", "if False:"),),
        (f"{DAMAGED}[index without end]",),
    ),
    Defence(
        "a manifest that is an index", never(MODEL, 'if "manifests" in value:'), (f"{DAMAGED}[manifest and index]",)
    ),
    Defence("encrypted layers", never(MODEL, "if layer.media_type not in LAYERS:"), (f"{DAMAGED}[encrypted]",)),
    Defence("artifacts", never(MODEL, "if config.media_type not in CONFIGS:"), (f"{DAMAGED}[artifact]",)),
    Defence(
        "a layer that comes twice",
        (
            (
                IMPORTING,
                "return next((number for (number,) in rows if number not in used), None)",
                "return next((number for (number,) in rows), None)",
            ),
        ),
        ("kernel/test_hostile.py::test_a_layer_that_comes_twice_has_two_trees",),
    ),
    Defence(
        "something behind the compressed stream",
        never(LAYER, "if not data.startswith(_GZIP):"),
        ("kernel/test_hostile.py::test_gzip_members_and_rubbish_after_them",),
    ),
    # Users.
    Defence(
        "the user database is looked up inside the root",
        (("native/lookup.c", "FM_RESOLVE_IN_ROOT | FM_RESOLVE_NO_MAGICLINKS", "0"),),
        ("kernel/test_executor.py::test_the_user_database_is_read_inside_the_root_alone",),
    ),
    Defence(
        "ids that no process can have",
        never(UNPACK, "if not 0 <= entry.uid <= _LAST_ID or not 0 <= entry.gid <= _LAST_ID:"),
        (f"{HOSTILE}[owner without an id]", f"{HOSTILE}[owner past 32 bits]"),
    ),
    Defence(
        "names that an image brings along",
        (
            (
                STORE,
                "            check_name(name)\n    except FlatmountError:",
                "            pass\n    except FlatmountError:",
            ),
        ),
        ("kernel/test_hostile.py::test_labels_and_names_of_an_image_control_nothing",),
    ),
    # Size.
    Defence(
        "bombs",
        never(UNPACK, "if stored > self._limits.total_bytes:"),
        ("kernel/test_hostile.py::test_bombs_meet_the_space_there_is",),
    ),
    Defence(
        "zeros after the end",
        never(TAR, "if trailing > TRAILING_BYTES:"),
        ("kernel/test_hostile.py::test_zeros_after_the_end_of_an_archive_end",),
    ),
    Defence(
        "zstd windows",
        ((LAYER, "ZstdDecompressor(max_window_size=_ZSTD_WINDOW)", "ZstdDecompressor(max_window_size=1 << 31)"),),
        ("kernel/test_hostile.py::test_a_zstd_window_of_gigabytes_is_refused",),
    ),
    Defence(
        "sparse bombs",
        never(UNPACK, "if entry.size > self._limits.file_bytes:"),
        ("kernel/test_hostile.py::test_a_sparse_bomb_takes_no_space",),
    ),
    Defence(
        "entries without end",
        never(UNPACK, "if count > self._limits.entries:"),
        ("kernel/test_hostile.py::test_entries_without_end",),
    ),
    Defence(
        "numbers of a header",
        ((TAR, "if not (-(1 << 62) if negative else 0) <= value < 1 << 62:", "if False:"),),
        (f"{DAMAGED}[negative size]", "unit/test_tar.py::test_what_is_no_archive_is_told"),
    ),
    # The kernel's side.
    Defence(
        "a target that is a link",
        (
            (
                "native/program.c",
                "AT_FDCWD, s1, FM_MOVE_MOUNT_F_EMPTY_PATH)",
                "AT_FDCWD, s1, FM_MOVE_MOUNT_F_EMPTY_PATH | 0x10)",
            ),
        ),
        ("kernel/test_executor.py::test_a_target_that_is_a_symbolic_link_is_not_followed",),
    ),
    Defence(
        "descriptors are closed by execve",
        (("native/program.c", "FM_OPEN_TREE_CLONE | FM_OPEN_TREE_CLOEXEC | r->x", "FM_OPEN_TREE_CLONE | r->x"),),
        ("kernel/test_hostile.py::test_no_descriptor_reaches_a_program",),
    ),
    Defence(
        "trees are not left through mounts",
        (
            (
                "native/tree_walk.c",
                "int child = fm_open_child(fd, name, FM_RESOLVE_NO_XDEV);",
                "int child = fm_open_child(fd, name, 0);",
            ),
            ("native/tree_walk.c", "resolve | FM_RESOLVE_BENEATH | FM_RESOLVE_NO_SYMLINKS", "resolve"),
        ),
        (
            "kernel/test_tree.py::test_nothing_is_removed_through_a_mount",
            "e2e/test_gc.py::test_nothing_is_deleted_through_a_mount",
        ),
    ),
    # Faults.
    Defence(
        "what a kill left is swept",
        (
            (
                DISK,
                "        for path in self.strays(known):\n            if path",
                "        for path in ():\n            if path",
            ),
        ),
        (KILL,),
    ),
    Defence(
        "a removal takes the book first",
        (
            (
                STORE,
                "    def _take_away(self, names",
                "    def remove_image(self, reference: str) -> Removed:\n"
                "        for layer in self.image(reference).layers:\n"
                "            self._disk.discard(layer.path)\n"
                "        return self._remove_image(reference)\n\n"
                "    def _take_away(self, names",
            ),
            (
                STORE,
                '    def remove_image(self, reference: str) -> Removed:\n        """',
                '    def _remove_image(self, reference: str) -> Removed:\n        """',
            ),
        ),
        (KILL,),
    ),
    Defence(
        "data is synced before the book",
        ((DISK, "        sync_filesystem(self.data_fd)\n", "        pass\n"),),
        ("kernel/test_kills.py::test_a_power_cut_loses_nothing_that_was_stored",),
    ),
    Defence(
        "a failure is undone",
        ((IMPORTING, 'for number in self._database.unbooked("layers", self._numbers):', "for number in ():"),),
        ("kernel/test_pull.py::test_a_failure_leaves_the_store_as_it_was", DAMAGED),
    ),
    Defence(
        "what an interrupt finds committed is not undone",
        (("src/flatmount/store/database.py", "known = self.known_trees()[kind]", "known: set[int] = set()"),),
        (
            "kernel/test_interrupted.py::test_an_import_that_is_in_the_book_stays",
            "kernel/test_interrupted.py::test_a_flat_tree_that_is_in_the_book_stays",
            "kernel/test_interrupted.py::test_a_repair_that_is_in_the_book_stays",
        ),
    ),
    Defence(
        "a tree is made of what is still there",
        never("src/flatmount/store/trees.py", "if not all(is_booked(db, source) for source in sources):"),
        ("kernel/test_fsck.py::test_a_tree_is_made_again_when_its_source_is_repaired_meanwhile",),
    ),
    Defence(
        "a lease finds what it is for",
        never(STORE, "if not all(is_booked(db, tree) for tree in trees):"),
        ("kernel/test_fsck.py::test_what_was_repaired_before_it_is_held_is_not_mounted",),
    ),
    Defence(
        "an upper is looked at when it goes",
        (
            (
                "src/flatmount/rootfs/collecting.py",
                "if upper.name in mounted or upper.name in _spoken_for(store, records, containers):",
                "if upper.name in mounted:",
            ),
        ),
        ("e2e/test_gc.py::test_a_kept_upper_that_is_mounted_while_others_are_removed_stays",),
    ),
    Defence(
        "a lease keeps its image",
        never(STORE, "if holders:"),
        ("kernel/test_images.py::test_an_image_in_use_stays",),
    ),
    Defence(
        "a newer schema is not written",
        never("src/flatmount/store/database.py", "if self.newer:"),
        ("kernel/test_images.py::test_a_store_of_a_newer_schema_is_read_and_not_changed",),
    ),
    Defence(
        "content is compared by fsck",
        never("src/flatmount/store/verify.py", "if _digest(fd, entry) != entry.digest:"),
        ("kernel/test_fsck.py::test_damage_is_found_and_repaired",),
    ),
    # The snapshot service's socket.
    Defence(
        "requests have a greatest length",
        never_c("if (stream->body_bytes + bytes > client->front->most_bytes + FRAME_HEAD)"),
        ("unit/test_front.py::test_a_request_that_is_too_long_is_refused_and_the_connection_goes_on",),
    ),
    Defence(
        "clients have a greatest number",
        never_c("if (front->staying == MOST_CLIENTS && !ask_to_go(front))"),
        ("unit/test_front.py::test_who_has_a_call_under_way_stays_and_one_more_is_refused",),
    ),
    Defence(
        "clients that say nothing keep nobody out",
        ((FRONT, "struct client *client = longest_silent(front, false);", "struct client *client = NULL;"),),
        (
            "unit/test_front.py::test_who_has_been_silent_longest_makes_room",
            "unit/test_front.py::test_without_descriptors_silent_clients_make_room",
        ),
    ),
    Defence(
        "clients that are asked to go and stay are let go",
        ((FRONT, "now_ns - client->asked_ns >= LEAVE_MS * 1000000u", "false"),),
        ("unit/test_front.py::test_who_has_been_silent_longest_makes_room",),
    ),
    Defence(
        "so are those that stay when more come than there are places",
        ((FRONT, "struct client *slow = longest_silent(front, true);", "struct client *slow = NULL;"),),
        ("unit/test_front.py::test_silent_clients_that_stay_keep_nobody_out",),
    ),
    Defence(
        "nobody waits for a client that never reads",
        (
            (FRONT, "MSG_NOSIGNAL | MSG_DONTWAIT", "MSG_NOSIGNAL"),
            (FRONT, "NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK", "NULL, NULL, SOCK_CLOEXEC"),
        ),
        ("unit/test_front.py::test_a_client_that_never_reads_holds_nobody_up",),
    ),
    Defence(
        "closing has an end",
        never_c("if (now_ns >= deadline_ns)"),
        ("unit/test_front.py::test_a_client_that_never_reads_does_not_keep_it_from_closing",),
    ),
    Defence(
        "nobody waits for a connection that is not there",
        ((FRONT, "flags | O_NONBLOCK) < 0", "flags) < 0"),),
        ("unit/test_front.py::test_a_connection_that_another_takes_is_not_waited_for",),
    ),
    Defence(
        "without descriptors it does not spin",
        ((FRONT, "usleep(10000);", ";"),),
        ("unit/test_front.py::test_without_descriptors_it_serves_whom_it_has_and_waits_for_more",),
    ),
    # Broken pulls.
    Defence(
        "what is bad is not gone on with",
        ((FETCH, "        if self._named and self._directory is not None:", "        if False:"),),
        ("kernel/test_pull.py::test_a_lost_registry_leaves_what_came_and_bad_bytes_do_not_stay",),
    ),
    Defence(
        "a spoiled beginning is fetched again",
        ((FETCH, "        return self._kept > 0\n", "        return False\n"),),
        ("kernel/test_pull.py::test_a_beginning_that_is_spoiled_is_fetched_again",),
    ),
    Defence(
        "one writer for each beginning",
        (
            (
                PARTIAL,
                "LOCK_EX | fcntl.LOCK_NB)\n            status = os.fstat(fd)\n            if not",
                "LOCK_SH)\n            status = os.fstat(fd)\n            if not",
            ),
        ),
        ("unit/test_partial.py::test_what_is_kept_is_gone_on_with_by_one_writer",),
    ),
    Defence(
        "the place of beginnings is not left through a link",
        ((PARTIAL, "os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC", "os.O_RDWR | os.O_CLOEXEC"),),
        ("unit/test_partial.py::test_collection_knows_age_and_touches_nothing_else",),
    ),
    Defence(
        "the same layer from two at once",
        never(IMPORTING, "if row is not None:"),
        ("kernel/test_images.py::test_two_imports_at_once_make_one_image",),
    ),
    Defence(
        "what only saves time goes when there is no room",
        (
            (
                IMPORTING,
                "                run.undo()\n                run.forget()\n                raise\n",
                "                run.undo()\n                raise\n",
            ),
        ),
        ("kernel/test_full_disk.py::test_a_step_that_finds_no_room[blocks-tmpfs-pull]",),
    ),
    Defence(
        "errors of the system are lines",
        (
            (
                UNPACK,
                '            except OSError as error:\n                raise _explain(error, f"entry',
                '            except ZeroDivisionError as error:\n                raise _explain(error, f"entry',
            ),
            (
                IMPORTING,
                '    except OSError as error:\n        raise from_os_error(error, f"{label}: unpack")',
                '    except ZeroDivisionError as error:\n        raise from_os_error(error, f"{label}: unpack")',
            ),
        ),
        ("kernel/test_hostile.py::test_too_few_descriptors_are_one_line",),
    ),
    Defence(
        "a store that cannot be written is left alone",
        ((STORE, "return self._database.writable and os.access(self._disk.base, os.W_OK)", "return True"),),
        (
            "kernel/test_hostile.py::test_a_read_only_store_is_read",
            "kernel/test_images.py::test_a_store_of_a_newer_schema_is_read_and_not_changed",
        ),
    ),
    Defence(
        "a registry's header, document and descriptor speak of one thing",
        never(
            "src/flatmount/image/registry.py",
            'if any((other in model.INDEXES) != indexes for other in known) or (indexes and ("layers" in value)):',
        ),
        ("unit/test_registry.py::test_an_index_that_says_manifest_and_is_an_index",),
    ),
    Defence(
        "links in the place of the store's own directories",
        (
            (
                DISK,
                "fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent_fd)",
                "fd = os.open(name, _DIRECTORY, dir_fd=parent_fd)",
            ),
        ),
        ("e2e/test_gc.py::test_no_link_of_the_stores_own_places_is_followed",),
    ),
    Defence(
        "one tree that is stuck stops no other",
        (("src/flatmount/store/removal.py", "            stuck.append(told)", "            raise"),),
        ("e2e/test_gc.py::test_a_mount_in_what_is_collected_stops_nothing_else",),
    ),
    Defence(
        "nobody sweeps what an import is about",
        ((DISK, 'with self._locked("lock", fcntl.LOCK_EX | fcntl.LOCK_NB):', "if True:"),),
        ("e2e/test_gc.py::test_a_collection_beside_imports_takes_nothing_of_theirs",),
    ),
    Defence(
        "a repair is verified",
        never(LAYER, "        if digest != said.digest:"),
        ("e2e/test_registry_trust.py::test_a_registry_that_cannot_repair_changes_nothing",),
    ),
)
