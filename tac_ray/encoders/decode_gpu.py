"""From the bytes of JPEG files to pixels on the GPU, by nvImageCodec; all others by Pillow."""

from collections.abc import Callable, Iterator, Sequence

import torch
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision import transforms

from tac_ray.encoders.clip import Encoder
from tac_ray.encoders.decode import MAX_PIXELS, decode_image, exif_turn, open_image

_END_OF_IMAGE = b"\xff\xd9"

DecodeJpegs = Callable[[list[bytes]], list[Tensor | None]]
"""JPEG files to pixels on the device, (height, width, 3) or (height, width, 1) uint8, None where
it fails. It neither turns nor resizes them."""


class GpuDecoder:
    """Decodes, resizes and crops for one encoder, on its device.

    Pixels differ from those of `decode_image` by a few levels, since nvJPEG and libjpeg round
    differently, so embeddings of both are close but not the same.
    """

    def __init__(self, encoder: Encoder, decode_jpegs: DecodeJpegs | None = None) -> None:
        """Find out how the encoder crops, and start the decoder.

        Args:
            encoder: gives the crop, the image size and the device.
            decode_jpegs: what decodes plain JPEGs; default is nvImageCodec.

        Raises:
            ValueError: the encoder's preprocessing is not a resize and a center crop.
            ImportError: nvImageCodec is not installed.
        """
        self._crop = encoder.crop
        self._device_crop = device_crop(encoder.crop)
        self._size = encoder.image_size
        self._device = encoder.device
        self._decode_jpegs = decode_jpegs or _nvimgcodec(encoder.device)

    @torch.inference_mode()
    def __call__(self, files: Sequence[bytes]) -> tuple[Tensor, list[str]]:
        """Pixels as the encoder takes them, and why an image has none.

        Plain JPEGs are decoded on the GPU, of which at most MAX_PIXELS pixels lie in its memory
        at a time. All others, and those it fails on, are decoded one by one on the CPU, which also
        says what is wrong with them.

        Args:
            files: contents of n image files.

        Returns:
            Pixels on the device, (n, height, width, 3) uint8, black where there is an error; and
            n errors, "" for a good image.
        """
        pixels = torch.zeros(len(files), *self._size, 3, dtype=torch.uint8, device=self._device)
        errors = [""] * len(files)
        rest = set(range(len(files)))
        for rows in _groups([_plain_pixels(data) for data in files]):
            images = self._decode_jpegs([files[row] for row in rows])
            for row, image in zip(rows, images, strict=True):
                if image is not None:
                    pixels[row] = resize_and_crop(image, self._device_crop)
                    rest.remove(row)
        for row in sorted(rest):
            try:
                pixels[row] = torch.from_numpy(decode_image(files[row], self._crop).copy())
            except ValueError as reason:
                errors[row] = str(reason)
        return pixels, errors


def device_crop(crop: transforms.Compose) -> transforms.Compose:
    """The steps of an encoder's crop that also work on tensors on a device.

    Raises:
        ValueError: it is not a bicubic, antialiased resize of the short side and a center crop.
    """
    resize, center = (*crop.transforms, None, None)[:2]
    if not (
        isinstance(resize, transforms.Resize)
        and resize.interpolation is transforms.InterpolationMode.BICUBIC
        and resize.antialias
        and isinstance(center, transforms.CenterCrop)
    ):
        raise ValueError(
            f"the encoder's preprocessing begins with {resize} and {center}; decoding on the GPU "
            "needs an antialiased bicubic Resize and a CenterCrop; decode on the CPU instead"
        )
    return transforms.Compose([resize, center])


def resize_and_crop(image: Tensor, crop: transforms.Compose) -> Tensor:
    """Pixels of one image as the encoder takes them.

    Of the same geometry as the crop of a Pillow image. Pillow rounds to whole levels after each
    of the two directions, and this once, in float32: they differ by at most 2 levels.

    Args:
        image: (h, w, 3) uint8; (h, w, 1) is gray.
        crop: what `device_crop` gives.

    Returns:
        (height, width, 3) uint8 on the device of `image`.
    """
    return crop(image.expand(-1, -1, 3).permute(2, 0, 1)).permute(1, 2, 0)


def _plain_pixels(data: bytes) -> int:
    """Pixels of a JPEG that the GPU decodes as `decode_image` would, 0 for all other files.

    Those that do not end where a JPEG ends may be truncated, which the GPU would not tell. Those
    that hold RGB instead of YCbCr nvImageCodec 0.9 takes for YCbCr, and the colors of those one
    pixel wide it spreads otherwise.
    """
    if not data.endswith(_END_OF_IMAGE):
        return 0
    try:
        with open_image(data) as image:
            # A JPEG with several pictures (MPO) is one too, of which both take the first.
            plain = (
                isinstance(image, JpegImageFile)
                and image.mode in ("L", "RGB")
                and min(image.size) > 1
                and image.info.get("adobe_transform") != 0
                and bytes(component for component, *_ in image.layer) != b"RGB"
                and exif_turn(image) is None
            )
            return image.width * image.height if plain else 0
    except ValueError:
        return 0


def _groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Places of the sizes above 0 in order, so many at a time as sum up to at most MAX_PIXELS."""
    group: list[int] = []
    total = 0
    for place, size in enumerate(sizes):
        if group and total + size > MAX_PIXELS:
            yield group
            group, total = [], 0
        if size:
            group.append(place)
            total += size
    if group:
        yield group


def _nvimgcodec(device: torch.device) -> DecodeJpegs:
    try:
        from nvidia import nvimgcodec  # type: ignore[import-not-found]
    except ImportError as error:
        major = (torch.version.cuda or "13").partition(".")[0]
        raise ImportError(
            "decoding on the GPU needs nvImageCodec, which is not installed; "
            f"pip install 'nvidia-nvimgcodec-cu{major}[nvjpeg]', or decode on the CPU"
        ) from error
    kinds = nvimgcodec.BackendKind
    index = torch.cuda.current_device() if device.index is None else device.index
    decoder = nvimgcodec.Decoder(
        device_id=index,
        # What the GPU cannot decode is Pillow's, not another library's on the CPU.
        backends=[
            nvimgcodec.Backend(kind)
            for kind in (kinds.HW_GPU_ONLY, kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU)
        ],
        # Colors are interpolated, as libjpeg does, instead of repeated.
        options=":fancy_upsampling=1",
    )
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def decode(files: list[bytes]) -> list[Tensor | None]:
        streams: list[object] = []
        places = []
        for place, data in enumerate(files):
            try:
                streams.append(nvimgcodec.CodeStream(data))
            except RuntimeError:  # a header that Pillow reads and nvImageCodec does not
                continue
            places.append(place)
        out: list[Tensor | None] = [None] * len(files)
        if streams:
            stream = torch.cuda.current_stream(device).cuda_stream
            images = decoder.decode(streams, params=params, cuda_stream=stream)
            for place, image in zip(places, images, strict=True):
                out[place] = None if image is None else torch.from_dlpack(image)
        return out

    return decode
