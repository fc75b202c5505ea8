// Light or dark, before anything is drawn: as it was chosen here, else as the system has it.
{
  const chosen = (() => {
    try {
      return localStorage.getItem("theme");
    } catch {
      return null; // storage may be forbidden
    }
  })();
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
