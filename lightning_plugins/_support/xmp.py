"""XMP packets: properties of the photograph itself are read and changed, and the rest of the packet stays as it was.

A packet is RDF in XML. A property stands as an attribute or as an element of an ``rdf:Description`` directly within the
``rdf:RDF``; those deeper down describe something else, such as the file that this one was derived from, and are left alone.
Packets come from outside: the parser takes no document type, and so no entity and no other file, and the size is held against
a cap first. Comments, processing instructions and prefixes survive; what does not are white space around the root, by which
writers reserve room, and the kind of quotes.

Source: ISO 16684-1 (XMP); Photo Sphere XMP Metadata for the GPano namespace.
"""

from collections.abc import Iterable, Mapping
from typing import Any
from xml.parsers.expat import ExpatError

from lightning_plugins._support.errors import InputError, one_line
from lightning_plugins._support.optional import require

MAX_PACKET_BYTES = 1 << 20
MAX_DEPTH = 100
NAMESPACES = {
    "GPano": "http://ns.google.com/photos/1.0/panorama/",
    "tiff": "http://ns.adobe.com/tiff/1.0/",
    "xmpNote": "http://ns.adobe.com/xmp/note/",
}

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_XMLNS = "http://www.w3.org/2000/xmlns/"
# minidom writes these as they are, and the next parser takes them for spaces or line ends: they pass as noncharacters of Unicode.
_GUARDS = {"\t": "\ufdd9", "\n": "\ufdda", "\r": "\ufddd"}
_EMPTY = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{_RDF}"><rdf:Description rdf:about=""/></rdf:RDF></x:xmpmeta>'
    '<?xpacket end="w"?>'
).encode()


def read_properties(packet: bytes) -> dict[str, str]:
    """Return the photograph's properties in ``NAMESPACES``, as ``{"GPano:PosePitchDegrees": "1.5"}``.

    Raises:
        InputError: if the packet is too large, malformed, too deep, has a document type, or describes nothing.
    """
    _, descriptions = _parse(packet)
    found: dict[str, str] = {}
    for prefix, namespace in NAMESPACES.items():
        for node in _nodes(descriptions, namespace):
            found.setdefault(f"{prefix}:{node.localName}", _text(node).strip())
    return found


def rewrite(packet: bytes, changes: Mapping[str, str | None]) -> bytes:
    """Return a packet with some properties changed, wherever they stand, added where they are missing, or taken out.

    Args:
        packet: any that ``read_properties`` takes.
        changes: as ``read_properties`` returns them; None takes a property out.

    Raises:
        InputError: as ``read_properties``, or if the packet uses a prefix that is needed for something else.
    """
    document, descriptions = _parse(packet)
    for name, value in changes.items():
        prefix, _, local = name.partition(":")
        nodes = [node for node in _nodes(descriptions, NAMESPACES[prefix]) if node.localName == local]
        for node in nodes:
            if value is None:
                _remove(node)
            else:
                _set_text(document, node, value)
        if value is not None and not nodes:
            _add(descriptions, prefix, local, value)
    return _serialise(document)


def new_packet(properties: Mapping[str, str | None]) -> bytes:
    """Return a packet that holds the properties given, save those that are None, and nothing else."""
    return rewrite(_EMPTY, properties)


def _parse(packet: bytes) -> tuple[Any, list[Any]]:
    """Return the document and the elements that describe the photograph."""
    if len(packet) > MAX_PACKET_BYTES:
        raise InputError(f"it has {len(packet)} bytes, and no more than {MAX_PACKET_BYTES} are read")
    try:
        document = require("defusedxml.minidom").parseString(packet.strip(b"\0 \t\r\n"), forbid_dtd=True)
    except require("defusedxml").DefusedXmlException as error:
        raise InputError("it has a document type or entities, which no XMP needs and a hostile one uses") from error
    except (ExpatError, ValueError, LookupError) as error:
        raise InputError(f"it is malformed ({one_line(str(error))})") from error
    _check_depth(document)
    root = document.documentElement
    graphs = [node for node in [root, *_elements(root)] if _is_rdf(node, "RDF")]
    descriptions = [node for graph in graphs[:1] for node in _elements(graph) if _is_rdf(node, "Description")]
    if not descriptions:
        raise InputError("it holds no rdf:Description")
    return document, descriptions


def _check_depth(document: Any) -> None:
    # Writing a document descends into it by recursion.
    level = [document.documentElement]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _elements(node)]
        if not level:
            return
    raise InputError(f"its elements are nested more than {MAX_DEPTH} deep")


def _serialise(document: Any) -> bytes:
    guard = str.maketrans(_GUARDS)
    for element in document.getElementsByTagName("*"):
        for attribute in element.attributes.values():
            attribute.value = attribute.value.translate(guard)
        for child in element.childNodes:
            if child.nodeType == child.TEXT_NODE:
                child.data = child.data.replace("\r", _GUARDS["\r"])
    text = "\n".join(node.toxml() for node in document.childNodes)
    for sign, stand_in in _GUARDS.items():
        text = text.replace(stand_in, f"&#{ord(sign)};")
    return text.encode()


def _elements(node: Any) -> list[Any]:
    return [child for child in node.childNodes if child.nodeType == child.ELEMENT_NODE]


def _is_rdf(node: Any, name: str) -> bool:
    return bool(node.namespaceURI == _RDF and node.localName == name)


def _nodes(descriptions: Iterable[Any], namespace: str) -> list[Any]:
    """Return the attributes and elements of a namespace that describe the photograph."""
    return [
        node
        for description in descriptions
        for node in [*description.attributes.values(), *_elements(description)]
        if node.namespaceURI == namespace
    ]


def _text(node: Any) -> str:
    if node.nodeType == node.ATTRIBUTE_NODE:
        return str(node.value)
    return "".join(child.data for child in node.childNodes if child.nodeType in (child.TEXT_NODE, child.CDATA_SECTION_NODE))


def _set_text(document: Any, node: Any, value: str) -> None:
    if node.nodeType == node.ATTRIBUTE_NODE:
        node.value = value
        return
    while node.firstChild:
        node.removeChild(node.firstChild)
    node.appendChild(document.createTextNode(value))


def _remove(node: Any) -> None:
    if node.nodeType == node.ATTRIBUTE_NODE:
        node.ownerElement.removeAttributeNode(node)
    else:
        node.parentNode.removeChild(node)


def _add(descriptions: list[Any], prefix: str, local: str, value: str) -> None:
    namespace = NAMESPACES[prefix]
    relatives = _nodes(descriptions, namespace)
    if relatives:
        first = relatives[0]
        home = first.ownerElement if first.nodeType == first.ATTRIBUTE_NODE else first.parentNode
        prefix = first.prefix or prefix
    else:
        home = descriptions[0]
    if _bound(home, prefix) not in ("", namespace):
        raise InputError(f"it uses the prefix {prefix} for something else")
    home.setAttributeNS(_XMLNS, f"xmlns:{prefix}", namespace)
    home.setAttributeNS(namespace, f"{prefix}:{local}", value)


def _bound(node: Any, prefix: str) -> str:
    """Return the namespace that a prefix stands for at an element, empty if for none."""
    while node.nodeType == node.ELEMENT_NODE:
        namespace = node.getAttributeNS(_XMLNS, prefix)
        if namespace:
            return str(namespace)
        node = node.parentNode
    return ""
