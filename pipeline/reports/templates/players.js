
// One player plays at a time; the other one of its song continues at the same position.
const players = [...document.querySelectorAll("audio")];
for (const player of players) {
  const known = () => { player.dataset.seconds = player.duration; };
  if (player.readyState) known(); else player.addEventListener("loadedmetadata", known);
  player.addEventListener("error", () => { player.nextElementSibling.hidden = false; });
  player.addEventListener("play", () => {
    for (const other of players) {
      if (other === player || other.paused) continue;
      other.pause();
      if (other.dataset.song === player.dataset.song) player.currentTime = other.currentTime;
    }
  });
}
