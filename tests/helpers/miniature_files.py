"""Miniatures of public data sets whose images are files, in their original layouts.

Each ``write_...`` returns the expected rows of each split.
"""

import json
import random
from pathlib import Path

import numpy as np

from tests.helpers.miniature_images import Row, Rows, paint, paint_rows, write_mat, write_text


def write_food101(root: Path) -> Rows:
    rows = {
        "train": [Row("images/apple_pie/7.jpg", "apple pie", 1), Row("images/apple_pie/5.jpg", "apple pie", 2)],
        "test": [Row("images/apple_pie/9.jpg", "apple pie", 3)],
    }
    rows["train"].append(Row("images/cup_cakes/11.jpg", "cup cakes", 4))
    rows["test"].append(Row("images/cup_cakes/10.jpg", "cup cakes", 5))
    for split in rows:
        lists: dict[str, list[str]] = {"cup_cakes": [], "apple_pie": []}
        for row in rows[split]:
            dish, file = row.key.split("/")[1:]
            lists[dish].append(f"{dish}/{Path(file).stem}")
        write_text(root / f"food-101/meta/{split}.json", json.dumps(lists))
    return paint_rows(root / "food-101", rows)


def write_sun397(root: Path) -> Rows:
    folder = root / "SUN397"
    rows = {
        "train": [Row("j/jail/indoor/sun_b.jpg", "jail indoor", 1), Row("a/abbey/sun_a.jpg", "abbey", 2)],
        "test": [Row("j/jail_cell/sun_c.jpg", "jail cell", 3), Row("j/jail/indoor/sun_d.jpg", "jail indoor", 4)],
    }
    write_text(folder / "ClassName.txt", "/a/abbey\n/j/jail/indoor\n/j/jail_cell\n")
    for split, name in (("train", "Training"), ("test", "Testing")):
        write_text(folder / f"{name}_01.txt", "".join(f"/{row.key}\n" for row in rows[split]))
        write_text(folder / f"{name}_02.txt", "/a/abbey/sun_a.jpg\n")
    return paint_rows(folder, rows)


def write_stanford_cars(root: Path) -> Rows:
    folder = root / "stanford_cars"
    names = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"]
    labels = {"train": [3, 1, 1], "test": [2, 3]}  # counted from 1
    rows: Rows = {}
    for split, numbers in labels.items():
        annotations = np.zeros((1, len(numbers)), dtype=[(name, object) for name in ("bbox_x1", "class", "fname")])
        rows[split] = []
        for i, label in enumerate(numbers):
            file = f"{i + 1:05}.jpg"
            annotations[0, i] = (30, label, file)
            rows[split].append(Row(f"cars_{split}/{file}", names[label - 1], i + (5 if split == "test" else 1)))
        path = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        write_mat(folder / path, annotations=annotations)
    write_mat(folder / "devkit/cars_meta.mat", class_names=np.array([names], dtype=object))
    return paint_rows(folder, rows)


def write_fgvc_aircraft(root: Path) -> Rows:
    folder = root / "fgvc-aircraft-2013b/data"
    lists = {
        "train": [("0034309", "Boeing 717", 1), ("0062765", "A310", 2)],
        "val": [("0034958", "An-12", 3)],
        "test": [("1514522", "A310", 4), ("0747566", "An-12", 5)],
    }
    lists["trainval"] = lists["train"] + lists["val"]
    write_text(folder / "variants.txt", "Boeing 717\nA310\nAn-12\n")
    for split, items in lists.items():
        write_text(folder / f"images_variant_{split}.txt", "".join(f"{file} {name}\n" for file, name, _ in items))
    return paint_rows(
        folder,
        {split: [Row(f"images/{file}.jpg", name, n) for file, name, n in items] for split, items in lists.items()},
    )


VOC_OBJECTS = {  # image: its objects; an asterisk marks difficult ones
    "000005": ["chair*", "chair", "chair*"],
    "000007": ["car", "person*"],
    "000009": ["horse", "person", "person"],
    "000001": ["dog", "tvmonitor*"],
    "000002": ["pottedplant"],
}


def write_voc2007(root: Path) -> Rows:
    folder = root / "VOCdevkit/VOC2007"
    lists = {"train": ["000005"], "val": ["000007", "000009"], "trainval": ["000005", "000007", "000009"]}
    lists["test"] = ["000001", "000002"]
    for split, images in lists.items():
        write_text(folder / f"ImageSets/Main/{split}.txt", "".join(f"{image}\n" for image in images))
    for image, things in VOC_OBJECTS.items():
        objects = "".join(
            f"<object><name>{thing.rstrip('*')}</name><difficult>{int(thing.endswith('*'))}</difficult>"
            "<part><name>head</name></part><bndbox><xmin>1</xmin></bndbox></object>"
            for thing in things
        )
        text = f"<annotation><folder>VOC2007</folder><filename>{image}.jpg</filename>{objects}</annotation>"
        write_text(folder / f"Annotations/{image}.xml", text)
    rows = {
        split: [Row(f"JPEGImages/{image}.jpg", "", int(image)) for image in images] for split, images in lists.items()
    }
    return paint_rows(folder, rows)


def write_dtd(root: Path) -> Rows:
    folder = root / "dtd/dtd"
    rows = {
        split: [
            Row(f"images/{name}/{name}_000{number}.jpg", name, number)
            for number, name in enumerate(("polka-dotted", "banded"), start)
        ]
        for split, start in (("train", 1), ("val", 3), ("test", 5))
    }
    for split, some in rows.items():
        lines = "".join(f"{row.key.removeprefix('images/')}\n" for row in some)
        write_text(folder / f"labels/{split}1.txt", lines)
        write_text(folder / f"labels/{split}2.txt", "banded/banded_0009.jpg\n")
    return paint_rows(folder, rows)


def write_oxford_pets(root: Path) -> Rows:
    folder = root / "oxford-iiit-pet"
    lists = {
        "trainval": [("Abyssinian_100", 1, 1), ("american_bulldog_103", 2, 2), ("Bengal_10", 3, 1)],
        "test": [("american_bulldog_1", 2, 2), ("Bengal_111", 3, 1), ("Abyssinian_201", 1, 1)],
    }
    rows: Rows = {}
    for split, items in lists.items():
        write_text(
            folder / f"annotations/{split}.txt", "".join(f"{name} {breed} {kind} 1\n" for name, breed, kind in items)
        )
        start = 1 if split == "test" else 4
        rows[split] = [
            Row(f"images/{name}.jpg", name.rsplit("_", 1)[0].replace("_", " "), i)
            for i, (name, _, _) in enumerate(items, start)
        ]
    return paint_rows(folder, rows)


def write_caltech101(root: Path) -> Rows:
    """Write four images per class, two of them for training, and the file ``tmp`` that is in the archive too."""
    folder = root / "caltech101/101_ObjectCategories"
    names = {"BACKGROUND_Google": "background", "Faces": "Faces", "Faces_easy": "Faces easy", "airplanes": "airplanes"}
    rows: Rows = {"train": [], "test": []}
    number = 1
    for name, words in names.items():
        for i in range(1, 5):
            row = Row(f"{name}/image_{i:04}.jpg", words, number)
            paint(folder / row.key, number)
            rows["train" if _among_first(name, i, 4, 2) else "test"].append(row)
            number += 1
    write_text(folder / "BACKGROUND_Google/tmp", "")
    return rows


def _among_first(name: str, number: int, count: int, shots: int) -> bool:
    from hashlib import blake2b

    digests = [blake2b(f"0/{name}/image_{i:04}.jpg".encode()).hexdigest() for i in range(1, count + 1)]
    return digests[number - 1] in sorted(digests)[:shots]


def write_flowers102(root: Path) -> Rows:
    folder = root / "flowers-102"
    labels = [77, 73, 1, 2, 102, 2]  # of images 1 to 6
    names = {77: "passion flower", 73: "water lily", 1: "pink primrose", 2: "hard-leaved pocket orchid"}
    names[102] = "blackberry lily"
    ids = {"train": ("trnid", [4, 1]), "val": ("valid", [2]), "test": ("tstid", [6, 3, 5])}
    write_mat(folder / "imagelabels.mat", labels=np.array([labels], np.uint8))
    write_mat(folder / "setid.mat", **{name: np.array([numbers], np.uint16) for name, numbers in ids.values()})
    rows = {
        split: [Row(f"jpg/image_{number:05}.jpg", names[labels[number - 1]], number) for number in numbers]
        for split, (_, numbers) in ids.items()
    }
    return paint_rows(folder, rows)


def write_eurosat(root: Path) -> Rows:
    """Write seven images per class, of which the options below sample six, and draw as the paper's author does."""
    folder = root / "eurosat/2750"
    words = {"AnnualCrop": "annual crop", "Forest": "forest", "HerbaceousVegetation": "herbaceous vegetation"}
    words |= {"Highway": "highway", "Industrial": "industrial", "Pasture": "pasture", "PermanentCrop": "permanent crop"}
    words |= {"Residential": "residential", "River": "river", "SeaLake": "sea lake"}
    rows = [Row(f"{name}/{name}_{i}.jpg", words[name], 7 * n + i) for n, name in enumerate(words) for i in range(7, 14)]
    paint_rows(folder, {"all": rows})
    row_of = {folder / row.key: row for row in rows}
    splits: Rows = {"train": [], "val": [], "test": []}
    before = random.getstate()
    random.seed(42)
    for class_folder in sorted(folder.iterdir()):
        kept = random.sample(sorted(class_folder.iterdir()), 6)
        for split, paths in (("train", kept[:2]), ("val", kept[2:4]), ("test", kept[4:])):
            splits[split] += sorted(row_of[path] for path in paths)
    random.setstate(before)
    return splits


def write_gtsrb(root: Path) -> Rows:
    base = root / "gtsrb"
    names = {0: "speed limit 20", 14: "stop", 42: "end of no passing for trucks", 1: "speed limit 30"}
    train = [Row(f"{label:05}/00000_00000.ppm", names.get(label, ""), label) for label in range(43)]
    train.insert(15, Row("00014/00000_00001.ppm", names[14], 43))
    for row in train:
        label = int(row.key[:5])
        paint(base / "GTSRB/Training" / row.key, row.number)
        header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
        write_text(base / f"GTSRB/Training/{label:05}/GT-{label:05}.csv", header)
    test = [Row("00000.ppm", names[14], 44), Row("00001.ppm", names[1], 45), Row("00002.ppm", names[42], 46)]
    ids = [14, 1, 42]
    lines = "".join(f"{row.key};9;6;1;1;8;5;{label}\n" for row, label in zip(test, ids, strict=True))
    write_text(base / "GT-final_test.csv", "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n" + lines)
    paint_rows(base / "GTSRB/Final_Test/Images", {"test": test})
    return {"train": train, "test": test}


KITTI_LABELS = [  # an image's objects (kind and distance), and its class
    ([("Car", 7.9), ("Pedestrian", 3.0)], "a car on the left or right side"),
    ([("Car", 30.0), ("Van", 8.0)], "a car on the left or right side"),
    ([("Truck", 8.01), ("DontCare", -1000.0)], "a car nearby"),
    ([("Car", 20.0)], "a car nearby"),
    ([("Car", 20.5), ("Tram", 5.0)], "a car in the distance"),
    ([("Cyclist", 5.0), ("DontCare", -1000.0)], "no car"),
]


def write_kitti(root: Path) -> Rows:
    """Write 36 images of 12 videos; numpy's legacy generator draws one video for ``val`` and one for ``test``."""
    raw = root / "Kitti/raw"
    count = 36
    order = np.random.RandomState(5).permutation(count)  # image -> line
    videos = [f"2011_09_26_drive_{line // 3:04}_sync" for line in range(count)]
    write_text(raw / "mapping/train_mapping.txt", "".join(f"2011_09_26 {v} {i:010}\n" for i, v in enumerate(videos)))
    write_text(raw / "mapping/train_rand.txt", ",".join(str(line + 1) for line in order))
    state = np.random.get_state()
    np.random.seed(123)
    test = np.random.choice(sorted(set(videos)), 1, replace=False)[0]
    val = np.random.choice(sorted(set(videos) - {test}), 1, replace=False)[0]
    np.random.set_state(state)
    rows: Rows = {"train": [], "val": [], "test": []}
    for i in range(count):
        objects, name = KITTI_LABELS[i % len(KITTI_LABELS)]
        lines = "".join(f"{kind} 0.00 0 -0.20 1 2 3 4 1.89 0.48 1.20 1.84 1.47 {z} 0.01\n" for kind, z in objects)
        write_text(raw / f"training/label_2/{i:06}.txt", lines)
        video = videos[order[i]]
        split = "test" if video == test else "val" if video == val else "train"
        rows[split].append(Row(f"image_2/{i:06}.png", name, i))
    return paint_rows(raw / "training", rows)


def write_country211(root: Path) -> Rows:
    folder = root / "country211"
    rows: Rows = {}
    for start, split in enumerate(("train", "valid", "test")):
        rows[split] = [Row(f"{name}/{i}.jpg", name, 3 * start + i) for name in ("AD", "BR", "ZW") for i in (1, 2)]
        paint_rows(folder / split, {split: rows[split]})
    return rows


def write_clevr_counts(root: Path) -> Rows:
    """Write three training and two validation images, all of which are used."""
    folder = root / "clevr/CLEVR_v1.0"
    rows: Rows = {}
    for split, part, counts in (("train", "train", [3, 10, 4]), ("test", "val", [10, 5])):
        rows[split] = [
            Row(f"images/{part}/CLEVR_{part}_{i:06}.png", str(count), i + 1) for i, count in enumerate(counts)
        ]
        scenes = [
            {"image_filename": f"CLEVR_{part}_{i:06}.png", "objects": [{"shape": "cube"}] * count}
            for i, count in enumerate(counts)
        ]
        write_text(folder / f"scenes/CLEVR_{part}_scenes.json", json.dumps({"info": {}, "scenes": scenes[::-1]}))
    return paint_rows(folder, rows)


def write_rendered_sst2(root: Path) -> Rows:
    rows: Rows = {}
    for number, (split, folder) in enumerate((("train", "train"), ("val", "valid"), ("test", "test"))):
        rows[split] = [
            Row(f"{name}/{i}.png", name, 3 * number + i) for name in ("negative", "positive") for i in (0, 1)
        ]
        paint_rows(root / "rendered-sst2" / folder, {split: rows[split]})
    return rows


def write_imagenet(root: Path) -> Rows:
    names = {"n01440764": "tench", "n01484850": "great white shark", "n15075141": "toilet paper"}
    rows: Rows = {}
    for number, split in enumerate(("train", "val")):
        rows[split] = [
            Row(f"{wnid}/ILSVRC2012_{i}.JPEG", name, 2 * number + i) for wnid, name in names.items() for i in (0, 1)
        ]
        paint_rows(root / split, {split: rows[split]})
    return rows
