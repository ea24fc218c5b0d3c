"""The refused specimens, each with a part of its error message."""

from __future__ import annotations

DISTILLED = "calls its denoiser once per step at every scale"
OTHERWISE = "its scheduler receives something else than its denoiser predicts"
TURNED = "its scheduler receives another shape than its denoiser predicts"
UNCERTAIN = "where the conditional pass lies is not certain: "
CACHED = "which cannot be stored with records"
STEPPED = "without guidance its scheduler steps without a denoiser's call before"

REFUSALS: dict[str, str] = {
    "AmusedPipeline": f"{UNCERTAIN}none of its denoiser's arguments follows the timestep",
    "BriaFiboPipeline": "its denoiser is given joint_attention_kwargs.attention_mask with guidance only",
    "Cosmos2TextToImagePipeline": OTHERWISE,
    "Cosmos2VideoToWorldPipeline": OTHERWISE,
    "CosmosTextToWorldPipeline": STEPPED,
    "DreamLitePipeline": "without guidance its denoiser sees 2 rows in a step for one sample",
    "Flux2Pipeline": DISTILLED,
    "GlmImagePipeline": CACHED,
    "HeliosPipeline (two chunks)": "it takes 6 steps, where its scheduler makes 3",
    "I2VGenXLPipeline": OTHERWISE,
    "Ideogram4Pipeline": DISTILLED,
    "LTXImageToVideoPipeline": TURNED,
    "LongCatAudioDiTPipeline": "its scheduler has no configuration",
    "QwenImage21Pipeline": CACHED,
    "SanaSprintPipeline": "num_inference_steps=3: SCMScheduler",
    "SkyReelsV2DiffusionForcingPipeline": STEPPED,
    "StableDiffusionPanoramaPipeline": "cannot be guided",
    "StableVideoDiffusionPipeline": "cannot be guided: its call takes none of",
    "TextToVideoSDPipeline": OTHERWISE,
}
