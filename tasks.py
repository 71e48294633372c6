"""Facts of the labelled sets: the paper's 26, class names, prompts for zero-shot transfer, captions for
training, the metric of each.

Paper: section 4.2 and appendix (prompt ensembling; ImageNet has seven prompts). The wording of names and
prompts here is ours; the published ones are read from their JSON files (`read_published`).

    class name "tabby cat" x templates -> P prompts; a class may have several names
"""

import json

PAPER = (  # the 26 sets of zero-shot transfer, in the paper's order
    "food101", "cifar10", "cifar100", "cub200", "sun397", "cars", "aircraft", "dtd", "pets", "caltech101",
    "flowers", "mnist", "fer2013", "stl10", "eurosat", "resisc45", "gtsrb", "kitti_distance", "country211",
    "patch_camelyon", "ucf101_frames", "kinetics700_frames", "clevr_counts", "hateful_memes",
    "rendered_sst2", "imagenet",
)  # fmt: skip
JUDGED_BY = {  # of the sets that are not judged by plain accuracy, "top1"
    "aircraft": "per_class",
    "pets": "per_class",
    "caltech101": "per_class",
    "flowers": "per_class",
    "kinetics700_frames": "top1_top5",
    "hateful_memes": "auc",
}

GENERIC = ("a photo of a {}.", "a picture of the {}.", "an image of one {}.", "there is a {} here.")
SMALL = ("a small photo of a {}.", "a blurred picture of a {}.", "a photo of the {}.")
ACTION = ("a photo of somebody doing this: {}.", "a frame of a video about {}.", "a person at {}.")
PROMPTS = {  # zero-shot templates of a set; GENERIC where none are given
    "scenes": ("a {}", "photo of a {}", "a picture of a {}", "my {}", "the {} we saw"),
    "scenes-colour": ("a {} one", "a {} thing", "photo of a {} one", "something {}"),
    "scenes-texture": ("a {} one", "a {} thing", "photo of a {} one", "something {}"),
    "scenes-heldout": ("a {}", "photo of a {}", "a picture of a {}", "my {}", "the {} we saw"),
    "imagenet": (
        "a photo of a {}.",
        "a close view of one {}.",
        "a blurred picture of the {}.",
        "several of {} in a photo.",
        "a {} drawn by hand.",
        "the {} seen from far away.",
        "a {} as in a game.",
    ),
    "fashionmnist": ("a photo of a {}.", "a {}, an article of clothing.", "a product picture of the {}."),
    "cifar10": SMALL,
    "cifar100": SMALL,
    "stl10": SMALL,
    "food101": ("a photo of {}, a dish.", "a plate of {}.", "{} as served in a restaurant."),
    "cub200": ("a photo of a {}, a bird.", "a {} in the wild.", "a bird: the {}."),
    "pets": ("a photo of a {}, a pet.", "my {} at home.", "a {}, a breed of cat or dog."),
    "flowers": ("a photo of a {}, a flower.", "the flower of a {}.", "a {} in bloom."),
    "cars": ("a photo of a {}.", "a {}, a car, in the street.", "a used {} for sale."),
    "aircraft": ("a photo of a {}, an aircraft.", "a {} on the ground.", "a {}, a type of aeroplane."),
    "sun397": ("a photo of a {}.", "the view of a {}.", "we are at the {}."),
    "dtd": ("a photo of a {} texture.", "a surface that is {}.", "something {}, close up."),
    "mnist": ("a photo of the number {}.", "the digit {}, written by hand.", "a handwritten {}."),
    "fer2013": ("a photo of a face that looks {}.", "a {} person.", "somebody who is {}, in grey."),
    "eurosat": ("a satellite picture of {}.", "{} seen from above.", "an aerial photo of {}."),
    "resisc45": ("a satellite picture of a {}.", "a {} seen from above.", "an aerial photo of the {}."),
    "gtsrb": ("a photo of a traffic sign: {}.", "the road sign for {}.", "a close view of a {} sign."),
    "kitti_distance": ("a photo from a car with {}.", "driving with {}.", "the road, and {}."),
    "country211": ("a photo taken in {}.", "how it looks in {}.", "a travel picture from {}."),
    "patch_camelyon": ("a microscope picture of {}.", "a stained slice of {}.", "a patch of {}."),
    "ucf101_frames": ACTION,
    "kinetics700_frames": ACTION,
    "clevr_counts": ("a picture of {}.", "{} on a grey floor.", "a rendered scene with {}."),
    "rendered_sst2": ("a {} review of a film.", "a text with a {} opinion.", "printed words: {}."),
    "hateful_memes": ("a {}.", "a picture with words on it, a {}.", "somebody posted a {}."),
}
CAPTIONS = {  # what a class name is wrapped in for training; GENERIC_CAPTIONS where none are given
    "fashionmnist": ("a {}", "a photo of a {}", "{} for sale", "product picture: {}", "my new {}"),
}
GENERIC_CAPTIONS = ("a {}", "a photo of a {}", "a picture of the {}", "one {}", "the {}")

COUNTRIES = """AD Andorra; AE the United Arab Emirates; AF Afghanistan; AG Antigua and Barbuda;
AI Anguilla; AL Albania; AM Armenia; AO Angola; AQ Antarctica; AR Argentina; AS American Samoa; AT Austria;
AU Australia; AW Aruba; AX the Aland Islands; AZ Azerbaijan; BA Bosnia and Herzegovina; BB Barbados;
BD Bangladesh; BE Belgium; BF Burkina Faso; BG Bulgaria; BH Bahrain; BI Burundi; BJ Benin;
BL Saint Barthelemy; BM Bermuda; BN Brunei; BO Bolivia; BQ Bonaire; BR Brazil; BS the Bahamas; BT Bhutan;
BV Bouvet Island; BW Botswana; BY Belarus; BZ Belize; CA Canada; CC the Cocos Islands;
CD the Democratic Republic of the Congo; CF the Central African Republic; CG the Republic of the Congo;
CH Switzerland; CI Ivory Coast; CK the Cook Islands; CL Chile; CM Cameroon; CN China; CO Colombia;
CR Costa Rica; CU Cuba; CV Cape Verde; CW Curacao; CX Christmas Island; CY Cyprus; CZ the Czech Republic;
DE Germany; DJ Djibouti; DK Denmark; DM Dominica; DO the Dominican Republic; DZ Algeria; EC Ecuador;
EE Estonia; EG Egypt; EH Western Sahara; ER Eritrea; ES Spain; ET Ethiopia; FI Finland; FJ Fiji;
FK the Falkland Islands; FM Micronesia; FO the Faroe Islands; FR France; GA Gabon; GB the United Kingdom;
GD Grenada; GE Georgia, the country; GF French Guiana; GG Guernsey; GH Ghana; GI Gibraltar; GL Greenland;
GM the Gambia; GN Guinea; GP Guadeloupe; GQ Equatorial Guinea; GR Greece; GS South Georgia, the island;
GT Guatemala; GU Guam; GW Guinea-Bissau; GY Guyana; HK Hong Kong; HM Heard Island; HN Honduras; HR Croatia;
HT Haiti; HU Hungary; ID Indonesia; IE Ireland; IL Israel; IM the Isle of Man; IN India;
IO the British Indian Ocean Territory; IQ Iraq; IR Iran; IS Iceland; IT Italy; JE Jersey; JM Jamaica;
JO Jordan; JP Japan; KE Kenya; KG Kyrgyzstan; KH Cambodia; KI Kiribati; KM the Comoros;
KN Saint Kitts and Nevis; KP North Korea; KR South Korea; KW Kuwait; KY the Cayman Islands; KZ Kazakhstan;
LA Laos; LB Lebanon; LC Saint Lucia; LI Liechtenstein; LK Sri Lanka; LR Liberia; LS Lesotho; LT Lithuania;
LU Luxembourg; LV Latvia; LY Libya; MA Morocco; MC Monaco; MD Moldova; ME Montenegro; MF Saint Martin;
MG Madagascar; MH the Marshall Islands; MK North Macedonia; ML Mali; MM Myanmar; MN Mongolia; MO Macau;
MP the Northern Mariana Islands; MQ Martinique; MR Mauritania; MS Montserrat; MT Malta; MU Mauritius;
MV the Maldives; MW Malawi; MX Mexico; MY Malaysia; MZ Mozambique; NA Namibia; NC New Caledonia; NE Niger;
NF Norfolk Island; NG Nigeria; NI Nicaragua; NL the Netherlands; NO Norway; NP Nepal; NR Nauru; NU Niue;
NZ New Zealand; OM Oman; PA Panama; PE Peru; PF French Polynesia; PG Papua New Guinea; PH the Philippines;
PK Pakistan; PL Poland; PM Saint Pierre and Miquelon; PN the Pitcairn Islands; PR Puerto Rico; PS Palestine;
PT Portugal; PW Palau; PY Paraguay; QA Qatar; RE Reunion; RO Romania; RS Serbia; RU Russia; RW Rwanda;
SA Saudi Arabia; SB the Solomon Islands; SC the Seychelles; SD Sudan; SE Sweden; SG Singapore;
SH Saint Helena; SI Slovenia; SJ Svalbard; SK Slovakia; SL Sierra Leone; SM San Marino; SN Senegal;
SO Somalia; SR Suriname; SS South Sudan; ST Sao Tome and Principe; SV El Salvador; SX Sint Maarten;
SY Syria; SZ Eswatini; TC the Turks and Caicos Islands; TD Chad; TF the French Southern Lands; TG Togo;
TH Thailand; TJ Tajikistan; TK Tokelau; TL East Timor; TM Turkmenistan; TN Tunisia; TO Tonga; TR Turkey;
TT Trinidad and Tobago; TV Tuvalu; TW Taiwan; TZ Tanzania; UA Ukraine; UG Uganda;
UM the Pacific islands of the United States; US the United States; UY Uruguay; UZ Uzbekistan;
VA the Vatican; VC Saint Vincent and the Grenadines; VE Venezuela; VG the British Virgin Islands;
VI the American Virgin Islands; VN Vietnam; VU Vanuatu; WF Wallis and Futuna; WS Samoa; XK Kosovo; YE Yemen;
YT Mayotte; ZA South Africa; ZM Zambia; ZW Zimbabwe"""
NUMBERS = "zero one two three four five six seven eight nine ten".split()
NAMES = {  # a list: the classes in their order; a dict: what the library, or a class folder, calls otherwise
    "mnist": [[word, str(digit)] for digit, word in enumerate(NUMBERS[:10])],
    "fashionmnist": [
        "t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
        "ankle boot",
    ],
    "stl10": ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"],
    "fer2013": ["angry", "disgusted", "afraid", "happy", "sad", "surprised", "neutral"],
    "patch_camelyon": ["healthy tissue", ["tumour tissue", "tissue with a tumour"]],
    "clevr_counts": [[f"{NUMBERS[n]} objects", f"{n} objects"] for n in range(3, 11)],
    "gtsrb": [
        *[f"a speed limit of {limit}" for limit in (20, 30, 50, 60, 70, 80)],
        "the end of a speed limit of 80", "a speed limit of 100", "a speed limit of 120", "no overtaking",
        "no overtaking by lorries", "right of way at the next crossing", "priority road", "give way", "stop",
        "no vehicles", "no lorries", "no entry", "danger", "a bend to the left", "a bend to the right",
        "a double bend", "a bumpy road", "a slippery road", "a road that narrows on the right", "road works",
        "traffic lights", "pedestrians", "children", "bicycles", "ice and snow", "wild animals",
        "the end of all limits", "turn right ahead", "turn left ahead", "straight on only",
        "straight on or right", "straight on or left", "keep right", "keep left", "roundabout",
        "the end of no overtaking", "the end of no overtaking by lorries",
    ],
    "eurosat": {
        "AnnualCrop": "fields of annual crops", "Forest": "a forest", "Highway": "a motorway",
        "HerbaceousVegetation": "wild grass and shrubs", "Industrial": "industrial buildings",
        "Pasture": "pasture", "PermanentCrop": "orchards and vineyards", "Residential": "houses of people",
        "River": "a river", "SeaLake": "the sea or a lake",
    },
    "caltech101": {
        "Faces": "face", "Faces_easy": "face in the middle of the picture", "Leopards": "leopard",
        "Motorbikes": "motorbike", "airplanes": "airplane", "binocular": "pair of binoculars",
        "car_side": "car from the side", "cougar_body": "body of a cougar", "cougar_face": "face of a cougar",
        "crocodile_head": "head of a crocodile", "flamingo_head": "head of a flamingo",
        "scissors": "pair of scissors", "water_lilly": "water lily",
    },
    "flowers": {"pink-yellow dahlia?": "pink and yellow dahlia", "bolero deep blue": "prairie gentian"},
    "kitti_distance": {
        "beside": "another car right beside it", "near": "another car close ahead",
        "far": "another car far ahead", "none": "no other car",
    },
    "hateful_memes": {"harmless": "harmless meme", "hateful": "hateful meme"},
    "country211": dict(entry.strip().split(" ", 1) for entry in COUNTRIES.split(";")),
}  # fmt: skip


def metric(name):
    """How the paper judges a set: "top1", "per_class", "top1_top5" or "auc"."""
    return JUDGED_BY.get(name, "top1")


def prompts(name):
    return PROMPTS.get(name, GENERIC)


def captions(name):
    return CAPTIONS.get(name, GENERIC_CAPTIONS)


def read_published(path, name, otherwise=None):
    """The entry of a set in the published `labels.json` or `templates.json`, or `otherwise`, if given, where
    the file has none. Raises ValueError or FileNotFoundError.
    """
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file at {path}: expected a JSON of set -> list") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if otherwise is not None and isinstance(table, dict) and name not in table:
        return otherwise
    if not isinstance(table, dict) or not isinstance(table.get(name), list):
        sets = ", ".join(table) if isinstance(table, dict) else type(table).__name__
        raise ValueError(f"{path} has no list under {name!r}: found {sets}")
    for entry in table[name]:
        if not isinstance(entry, str) and not (
            isinstance(entry, list) and all(isinstance(e, str) for e in entry)
        ):
            raise ValueError(f"{path}: {name!r} holds {entry!r}, expected strings or lists of strings")
    return table[name]
