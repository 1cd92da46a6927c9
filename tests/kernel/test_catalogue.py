"""What others may know of a store is what its owner knows."""

from __future__ import annotations

from pathlib import Path

from images import file, layout_of

from flatmount.store import Catalogue, FlatForm, Store


def test_the_catalogue_has_the_form_that_containers_get(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    with Store.open(root, create=True) as store:
        image = store.import_image(layout_of(str(tmp_path / "layout"), [[file("a")]]), name="web")

        def known() -> FlatForm:
            return Catalogue.open(root).flat_form(image)

        assert known() is store.flat_form(image) is FlatForm.HARDLINK
        store.ensure_flat(image)
        store.ensure_flat(image, FlatForm.EROFS)
        assert known() is store.flat_form(image) is FlatForm.EROFS
        for form in (FlatForm.HARDLINK, FlatForm.EROFS):
            store.prefer_flat(image, form)
            assert known() is store.flat_form(image) is form
        store.drop_flat(image, FlatForm.HARDLINK)
        store.prefer_flat(image, FlatForm.HARDLINK)
        assert known() is store.flat_form(image) is FlatForm.EROFS
