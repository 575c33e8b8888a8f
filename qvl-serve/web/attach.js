/* attach.js - pictures and videos on their way into a message.
 * Job: files, pastes, drops and the camera to Blobs that the server reads, with previews.
 * Input: File objects. Output: media: {kind: "image", blobs: [key], width, height, name} or {kind: "video", blobs, fps, ...}.
 * Invariants: previews are turned by EXIF as the server turns the picture; what the server cannot read (GIF, AVIF, HEIC where the
 *             browser can) goes through a canvas to PNG; a video becomes at most MOST frames. */
import { keepBlob } from "./store.js";

const READ = ["image/jpeg", "image/png", "image/webp"], MOST = 32, SIDE = 768;

const toBlob = (canvas, type, quality) => new Promise((resolve, reject) => canvas.toBlob((b) => (b ? resolve(b) : reject(new Error("canvas"))), type, quality));
function canvasOf(source, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").drawImage(source, 0, 0, width, height);
  return canvas;
}

export async function picture(file) {
  const bitmap = await createImageBitmap(file); // turned by EXIF: the default of all browsers now
  const { width, height } = bitmap;
  const blob = READ.includes(file.type) ? file.slice(0, file.size, file.type) : await toBlob(canvasOf(bitmap, width, height), "image/png");
  bitmap.close();
  return { kind: "image", name: file.name || "picture", width, height, blobs: [await keepBlob(blob)] };
}

const event = (target, name) => new Promise((resolve, reject) => {
  target.addEventListener(name, resolve, { once: true });
  target.addEventListener("error", () => reject(new Error(target.error?.message || "video")), { once: true });
});

/* Frames at 2 a second, fewer when there would be more than MOST. */
export async function video(file) {
  const element = document.createElement("video"), source = URL.createObjectURL(file);
  element.muted = true;
  element.preload = "auto";
  element.src = source;
  try {
    await event(element, "loadeddata");
    const seconds = Number.isFinite(element.duration) ? element.duration : 0;
    const count = Math.max(1, Math.min(MOST, Math.floor(seconds * 2) || 1)), fps = seconds > 0 ? Math.min(2, count / seconds) : 2;
    const scale = Math.min(1, SIDE / Math.max(element.videoWidth, element.videoHeight));
    const width = Math.max(1, Math.round(element.videoWidth * scale)), height = Math.max(1, Math.round(element.videoHeight * scale)), blobs = [];
    for (let i = 0; i < count; i++) {
      element.currentTime = Math.min(seconds, i / fps);
      if (i || element.seeking) await event(element, "seeked");
      blobs.push(await keepBlob(await toBlob(canvasOf(element, width, height), "image/jpeg", 0.9)));
    }
    return { kind: "video", name: file.name || "video", width, height, fps: Math.round(fps * 100) / 100, blobs };
  } finally {
    URL.revokeObjectURL(source);
  }
}

export async function read(file) {
  if (file.type.startsWith("video/")) return video(file);
  return picture(file);
}

/* A picture from the camera; null when the user leaves. */
export async function camera(dialog, view, take, leave) {
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  view.srcObject = stream;
  await view.play();
  dialog.showModal();
  try {
    const taken = await new Promise((resolve) => {
      take.onclick = () => resolve(true);
      leave.onclick = () => resolve(false);
      dialog.oncancel = () => resolve(false);
    });
    if (!taken) return null;
    const blob = await toBlob(canvasOf(view, view.videoWidth, view.videoHeight), "image/jpeg", 0.92);
    return { kind: "image", name: "camera.jpg", width: view.videoWidth, height: view.videoHeight, blobs: [await keepBlob(blob)] };
  } finally {
    for (const track of stream.getTracks()) track.stop();
    view.srcObject = null;
    dialog.close();
  }
}
